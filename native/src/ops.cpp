#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace gmtp {
namespace {

// Where a position lies in the chunk that begins at `base`; its nearer end for one outside.
int within(int64_t position, int64_t base) { return static_cast<int>(std::clamp<int64_t>(position - base, 0, kChunkPositions)); }

const float* or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

}  // namespace

void EmbedOp::run(const Run& r) const {
    r.each_row(*out, [&](int i) {
        table->read(r.pass.tokens[i], row(*out, i));
        r.layer.scale(row(*out, i), out->width, factor);
        r.wrote(*out, i);
    });
}

void RopeOp::run(const Run& r) const {
    const auto pairs = static_cast<int64_t>(frequencies.size());
    r.each_row(*out, [&](int i) {
        float* cosines = row(*out, i);
        const auto position = static_cast<float>(r.pass.positions[i]);
        for (int64_t p = 0; p < pairs; p++) {
            const double angle = position * frequencies[p];  // a float product, as the models were trained with
            cosines[p] = static_cast<float>(std::cos(angle));
            cosines[pairs + p] = static_cast<float>(std::sin(angle));
        }
    });
}

void NormOp::run(const Run& r) const {
    r.each_row(*out, [&](int i) {
        r.layer.rms_norm(row(*x, i), or_null(weight), out->width, eps, row(*out, i));
        r.wrote(*out, i);
    });
}

void HeadsOp::run(const Run& r) const {
    r.each_row(*x, [&](int i) {
        for (float *head = row(*x, i), *end = head + x->width; head < end; head += dim) {
            if (eps >= 0) r.layer.rms_norm(head, or_null(weight), dim, eps, head);
            if (rope) {
                const int64_t pairs = rope->width / 2;
                r.layer.rotate(head, dim, pairs, row(*rope, i), row(*rope, i) + pairs);
            }
        }
        r.wrote(*x, i);
    });
}

void ProjectOp::run(const Run& r) const {
    const int rows = r.rows(*x);
    if (!rows) return;
    int64_t total = 0;
    for (const auto& w : weights) total += w->matrix.groups();
    r.each_stretch(total, piece_groups(weights.front()->matrix), [&](int64_t begin, int64_t end) {
        int64_t first = 0;  // of this matrix, in the groups of all
        for (size_t i = 0; i < weights.size(); i++) {
            const Matrix& m = weights[i]->matrix;
            const int64_t g0 = std::max(begin - first, int64_t{0}), g1 = std::min(end - first, m.groups());
            if (g0 < g1) r.matmul.matmul(m, g0, g1, x->data, 0, rows, outs[i]->data.x, outs[i]->data.stride);
            first += m.groups();
        }
    });
}

void gated_groups(const Run& r, const Matrix& gate, int64_t g0, const Matrix& up, int64_t u0, int64_t groups, const Buffer& x,
                  int row0, int row1, const Buffer& out, int64_t column) {
    constexpr int kTileRows = 32;
    alignas(64) float left[kTileRows * kBlock], right[kTileRows * kBlock];  // two groups, so a whole block a row
    const int64_t width = groups * kGroupRows;
    for (int begin = row0; begin < row1; begin += kTileRows) {
        const int end = std::min(begin + kTileRows, row1);
        // The kernel writes to column 16 g of row t: shift so that this tile lands at the start of the scratch.
        r.matmul.matmul(gate, g0, g0 + groups, x.data, begin, end, left - begin * kBlock - g0 * kGroupRows, kBlock);
        r.matmul.matmul(up, u0, u0 + groups, x.data, begin, end, right - begin * kBlock - u0 * kGroupRows, kBlock);
        for (int t = begin; t < end; t++) {
            const int64_t at = static_cast<int64_t>(t - begin) * kBlock;
            r.layer.gated_gelu(left + at, right + at, width, row(out, t) + column);
            r.wrote(out, t, column, column + width);
        }
    }
}

void GatedOp::run(const Run& r) const {
    const int rows = r.rows(*x);
    const Matrix &g = gate->matrix, &u = up->matrix;
    const int64_t pairs = (g.groups() + 1) / 2;
    r.each_stretch(pairs, std::max<int64_t>(1, piece_groups(g) / 4), [&](int64_t begin, int64_t end) {
        for (int64_t g0 = begin * 2; g0 < std::min(end * 2, g.groups()); g0 += 2)
            gated_groups(r, g, g0, u, g0, std::min<int64_t>(2, g.groups() - g0), *x, 0, rows, *out, g0 * kGroupRows);
    });
}

void GeluTimesOp::run(const Run& r) const {
    r.each_row(*out, [&](int i) {
        r.layer.gated_gelu(row(*gate, i), row(*x, i) + column, out->width, row(*out, i));
        r.wrote(*out, i);
    });
}

void AddOp::run(const Run& r) const {
    r.each_row(*x, [&](int i) {
        if (norm) {
            float* scratch = row(*y, i);  // y is not read again after it is added
            r.layer.rms_norm(scratch, or_null(weight), x->width, eps, scratch);
        }
        r.layer.add_scaled(row(*y, i), factor, x->width, row(*x, i));
        r.wrote(*x, i);
    });
}

void ScaleOp::run(const Run& r) const {
    r.each_row(*x, [&](int i) {
        r.layer.scale(row(*x, i), x->width, factor);
        r.wrote(*x, i);
    });
}

void RememberOp::run(const Run& r) const {
    const KvCache& cache = *r.pass.cache;
    const KvLayer& shape = cache.layer(layer);
    for (const Segment& s : r.pass.segments)
        for (int i = 0; i < s.count; i++) {
            const int at = s.row + i;
            if (at % r.pool.size() != r.thread) continue;
            const int64_t position = s.start + i;
            const int slot = static_cast<int>(position % kPagePositions);
            for (int64_t h = 0; h < shape.kv_heads; h++) {
                r.layer.store_key(cache.type(), row(*k, at) + h * shape.head_dim, shape.head_dim, slot,
                                  cache.keys(s.sequence, layer, h, position));
                r.layer.store_value(cache.type(), row(*v, at) + h * shape.head_dim, shape.head_dim, slot,
                                    cache.values(s.sequence, layer, h, position));
            }
        }
}

void AttendOp::prepare(const Pass& pass) {
    tiles.clear();
    int64_t from = std::numeric_limits<int64_t>::max(), to = 0;
    const int tile_rows = static_cast<int>(std::max<int64_t>(1, kMaxQueries / group()));
    for (const Segment& s : pass.segments) {
        for (int i = 0; i < s.count; i += tile_rows) tiles.push_back({&s, s.row + i, std::min(tile_rows, s.count - i)});
        from = std::min(from, first_seen(s.start)), to = std::max(to, s.start + s.count);
    }
    first_chunk = from / kChunkPositions;
    chunks = (to + kChunkPositions - 1) / kChunkPositions - first_chunk;
    split = units() < 4 * static_cast<int64_t>(scratch.size()) && chunks > 1;
    if (split) {
        const size_t places = static_cast<size_t>(pass.rows) * heads * chunks;
        if (parts->partials.size() < places) parts->partials.resize(places);
        if (parts->results.size() < places * shape.head_dim) parts->results.resize(places * shape.head_dim);
    }
}

AttendOp::Unit AttendOp::unit(int64_t i) const {
    const auto count = static_cast<int64_t>(tiles.size());
    const int64_t first = i % slices() * step(), tile = i / slices() % count, kv_head = i / slices() / count;
    return {tiles[tile], kv_head, kv_head * group() + first, std::min(step(), group() - first)};
}

KvChunk AttendOp::chunk(const Pass& pass, const Unit& u, int64_t index) const {
    const KvCache& cache = *pass.cache;
    const int64_t base = index * kChunkPositions;
    KvChunk found{};
    found.begin = within(first_seen(pass.positions[u.tile.row]), base);
    found.end = within(past_seen(pass.positions[u.tile.row + u.tile.rows - 1]), base);
    for (int p = found.begin / kPagePositions; p * kPagePositions < found.end; p++) {
        found.keys[p] = cache.keys(u.tile.segment->sequence, layer, u.kv_head, base + p * kPagePositions);
        found.values[p] = cache.values(u.tile.segment->sequence, layer, u.kv_head, base + p * kPagePositions);
    }
    return found;
}

void AttendOp::attend(const Run& r, const Unit& u, int64_t index, const KvChunk& chunk, Partial* partial, float* result) const {
    const int64_t base = index * kChunkPositions, dim = shape.head_dim;
    const int queries = u.queries();
    if (chunk.begin >= chunk.end) {
        for (int i = 0; i < queries; i++) partial[i] = {-std::numeric_limits<float>::infinity(), 0};
        return;
    }
    Scratch& mine = scratch[r.thread];
    int first[kMaxQueries], last[kMaxQueries];
    for (int t = 0; t < u.tile.rows; t++) {
        const int64_t position = r.pass.positions[u.tile.row + t];
        const int from = within(first_seen(position), base), to = within(past_seen(position), base);
        for (int64_t h = 0; h < u.n; h++) first[t * u.n + h] = from, last[t * u.n + h] = to;
        const float* head = row(*q, u.tile.row + t) + u.head * dim;
        for (int64_t h = 0; h < u.n; h++)
            for (int64_t d = 0; d < dim; d++) mine.q[d * queries + t * u.n + h] = head[h * dim + d] * factor;
    }
    r.layer.attend_chunk(r.pass.cache->type(), mine.q.data(), queries, dim, chunk, first, last, mine.weights.data(), partial, result);
}

void AttendOp::run(const Run& r) const {
    const int64_t dim = shape.head_dim, count = units();
    Scratch& mine = scratch[r.thread];
    const auto fetch = [](KvChunk& now, const KvChunk& next) {
        if (next.keys[0] != now.keys[0]) std::copy(std::begin(next.keys), std::end(next.keys), now.ahead);
    };
    if (split) {
        r.each_piece(count * chunks, [&](int64_t piece) {
            const Unit u = unit(piece % count);
            const int64_t index = first_chunk + piece / count;
            KvChunk now = chunk(r.pass, u, index);
            if (r.loop.goes_on(count * chunks, piece))
                fetch(now, chunk(r.pass, unit((piece + 1) % count), first_chunk + (piece + 1) / count));
            Partial partial[kMaxQueries];
            attend(r, u, index, now, partial, mine.out.data());
            for (int i = 0; i < u.queries(); i++) {
                const size_t at = place(u.row_of(i), u.head_of(i), index);
                parts->partials[at] = partial[i];
                if (partial[i].total > 0) std::memcpy(&parts->results[at * dim], &mine.out[i * dim], dim * sizeof(float));
            }
        });
        return;
    }
    r.each_piece(count, [&](int64_t piece) {
        const Unit u = unit(piece);
        const int queries = u.queries();
        const int64_t last = (past_seen(r.pass.positions[u.tile.row + u.tile.rows - 1]) + kChunkPositions - 1) / kChunkPositions;
        const auto result = [&](int i) { return row(*out, u.row_of(i)) + u.head_of(i) * dim; };
        Partial partial[kMaxQueries], running[kMaxQueries];
        for (int i = 0; i < queries; i++) {
            running[i] = {-std::numeric_limits<float>::infinity(), 0};
            std::memset(result(i), 0, dim * sizeof(float));
        }
        int64_t index = first_seen(r.pass.positions[u.tile.row]) / kChunkPositions;
        for (KvChunk now = chunk(r.pass, u, index), next; index < last; index++, now = next) {
            next = chunk(r.pass, u, index + 1);
            fetch(now, next);
            attend(r, u, index, now, partial, mine.out.data());
            for (int i = 0; i < queries; i++)
                if (partial[i].total > 0) r.layer.merge(&running[i], result(i), &partial[i], &mine.out[i * dim], dim);
        }
        for (int i = 0; i < queries; i++) {
            if (running[i].total > 0) r.layer.scale(result(i), dim, 1.0f / running[i].total);
            const int64_t column = u.head_of(i) * dim;
            r.wrote(*out, u.row_of(i), column, column + dim);
        }
    });
}

void MergeOp::run(const Run& r) const {
    const AttendOp& a = *attend;
    if (!a.split) return;
    const int64_t dim = a.shape.head_dim;
    r.each_piece(r.pass.rows * a.heads, [&](int64_t piece) {
        const int64_t at = piece / a.heads, head = piece % a.heads, position = r.pass.positions[at];
        float* result = row(*a.out, at) + head * dim;
        std::memset(result, 0, dim * sizeof(float));
        Partial running = {-std::numeric_limits<float>::infinity(), 0};
        const int64_t last = (a.past_seen(position) + kChunkPositions - 1) / kChunkPositions;
        for (int64_t chunk = a.first_seen(position) / kChunkPositions; chunk < last; chunk++) {
            const size_t from = a.place(at, head, chunk);
            const Partial& part = a.parts->partials[from];
            if (part.total > 0) r.layer.merge(&running, result, &part, &a.parts->results[from * dim], dim);
        }
        if (running.total > 0) r.layer.scale(result, dim, 1.0f / running.total);
        r.wrote(*a.out, at, head * dim, head * dim + dim);
    });
}

void CopyOp::run(const Run& r) const {
    r.each_row(*out, [&](int i) {
        std::memcpy(row(*out, i), row(*x, i), out->width * sizeof(float));
        r.wrote(*out, i);
    });
}

void ConcatOp::run(const Run& r) const {
    r.each_row(*out, [&](int i) {
        std::memcpy(row(*out, i), row(*a, i), a->width * sizeof(float));
        std::memcpy(row(*out, i) + a->width, row(*b, i), b->width * sizeof(float));
        r.wrote(*out, i);
    });
}

void OutputsOp::run(const Run& r) const {
    r.each_row(*out, [&](int i) {
        std::memcpy(row(*out, i), row(*x, r.pass.outputs[i]), out->width * sizeof(float));
        r.wrote(*out, i);
    });
}

void SoftcapOp::run(const Run& r) const {
    constexpr int64_t kPiece = 8192;
    const int64_t per_row = (x->width + kPiece - 1) / kPiece;
    r.each_piece(r.rows(*x) * per_row, [&](int64_t piece) {
        const int64_t column = piece % per_row * kPiece;
        r.layer.softcap(row(*x, piece / per_row) + column, std::min(kPiece, x->width - column), cap);
    });
}

}  // namespace gmtp
