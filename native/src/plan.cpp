#include "gmtp/plan.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <map>
#include <utility>

#include "gmtp/error.h"
#include "ops.h"

namespace gmtp {
namespace {

constexpr int64_t kLanes = 16;

int64_t padded(int64_t width) { return (width + kBlock - 1) / kBlock * kBlock; }

enum Touch : uint8_t {  // accesses to a buffer since the last barrier
    kReadRows = 1, kReadOutputs = 2, kReadPieces = 4, kWroteRows = 8, kWroteOutputs = 16, kWrotePieces = 32,
    kAnyWrite = kWroteRows | kWroteOutputs | kWrotePieces, kAny = 63,
};

uint8_t read_touch(Share s) { return s == Share::PassRows ? kReadRows : s == Share::OutputRows ? kReadOutputs : kReadPieces; }
uint8_t write_touch(Share s) { return static_cast<uint8_t>(read_touch(s) << 3); }

Share by_rows(const Buffer& b) { return b.rows == Rows::Pass ? Share::PassRows : Share::OutputRows; }

}  // namespace

Plan::Plan(std::shared_ptr<ThreadPool> pool, const Kernels& kernels, int max_rows, int max_outputs)
    : pool_(std::move(pool)), kernels_(kernels), max_rows_(max_rows), max_outputs_(max_outputs) {
    if (max_rows < 1 || max_outputs < 1) throw InputError("a plan needs room for at least one row and one output");
}

Plan::~Plan() = default;

Buffer& Plan::get(BufferId id) {
    if (id < 0 || id >= static_cast<int>(buffers_.size())) throw InputError("no such buffer in the plan");
    return *buffers_[id];
}

BufferId Plan::make(int64_t width, Rows rows) {
    if (width < 1 || width % kLanes) throw InputError("a vector of " + std::to_string(width) + " values: widths must be multiples of 16");
    auto b = std::make_unique<Buffer>(Buffer{width, rows, {}});
    b->data.stride = padded(width);
    buffers_.push_back(std::move(b));
    return static_cast<BufferId>(buffers_.size()) - 1;
}

// Notes that `reader` multiplies buffer `id`: quantised weights want its int8 form too, in as many digits.
void Plan::read_by(const Matrix& reader, BufferId id, int digits) {
    Buffer& b = get(id);
    if (!reader.data) throw InputError("a matrix in two parts gives nothing but logits");
    if (reader.cols != b.width)
        throw InputError("a matrix of " + std::to_string(reader.cols) + " columns cannot multiply a vector of " + std::to_string(b.width));
    if (is_float(reader.type)) return;
    b.data.digits = std::max(b.data.digits, digits);
    b.quantised = true;
}

size_t Plan::float_bytes(const Buffer& b) const {
    return static_cast<size_t>(b.rows == Rows::Pass ? max_rows_ : max_outputs_) * b.per_row * b.data.stride * sizeof(float);
}

size_t Plan::quantised_bytes(const Buffer& b) const {
    return b.quantised ? float_bytes(b) / sizeof(float) / kBlock * b.data.digits * sizeof(QuantBlock) : 0;
}

void Plan::finish(std::span<const BufferId> kept) {
    if (finished_) throw InputError("a finished plan cannot be finished again");
    finished_ = true;
    const int end = static_cast<int>(ops_.size());
    struct Use { int first = INT_MAX, last = -1; };  // ops that touch a buffer
    std::vector<Use> uses(buffers_.size());
    for (int i = 0; i < end; i++)
        for (const auto* ids : {&ops_[i]->reads, &ops_[i]->writes})
            for (int id : *ids)
                if (id >= 0) uses[id].first = std::min(uses[id].first, i), uses[id].last = i;
    for (size_t id = 0; id < uses.size(); id++)
        if (buffers_[id]->input) uses[id].first = 0;
    for (BufferId id : kept) get(id).kept = true, uses[id].last = end;

    struct Block { size_t bytes; uint8_t* memory; };
    std::vector<Block> unused;
    std::vector<std::pair<int, Block>> used;  // with the last op that does
    for (int i = 0; i < end; i++) {
        if (ops_[i]->barrier)  // only past a barrier has every thread left the ops before it
            std::erase_if(used, [&](const auto& u) {
                if (u.first < i) unused.push_back(u.second);
                return u.first < i;
            });
        for (size_t id = 0; id < uses.size(); id++) {
            if (uses[id].first != i) continue;
            Buffer& b = *buffers_[id];
            const bool shared = b.width % kBlock == 0;  // otherwise the zeros that fill a row's last block must stay
            auto best = unused.end();
            for (auto u = unused.begin(); shared && u != unused.end(); ++u)
                if (u->bytes >= bytes(b) && (best == unused.end() || u->bytes < best->bytes)) best = u;
            Block block{bytes(b), nullptr};
            if (best != unused.end()) {
                block = *best;
                unused.erase(best);
            } else {
                arena_.push_back(aligned_bytes(block.bytes));
                arena_bytes_ += block.bytes;
                block.memory = arena_.back().get();
            }
            if (!shared) std::memset(block.memory, 0, block.bytes);
            b.data.x = reinterpret_cast<float*>(block.memory);
            if (b.quantised) b.data.q = reinterpret_cast<QuantBlock*>(block.memory + float_bytes(b));
            if (shared) used.emplace_back(uses[id].last, block);
        }
    }
}

const Buffer& Plan::buffer(BufferId id) const {
    const Buffer& b = *buffers_.at(id);
    if (!finished_ || !(b.input || b.kept)) throw InputError("this buffer of the plan has no memory of its own");
    return b;
}

void Plan::append(std::unique_ptr<Op> op) {
    if (finished_) throw InputError("a finished plan takes no more ops");
    auto index = [&](int id) { return static_cast<size_t>(id >= 0 ? 2 * id : -2 * id - 1); };  // buffers even, layers odd
    auto touched = [&](int id) -> uint8_t& {
        if (touched_.size() <= index(id)) touched_.resize(index(id) + 1);
        return touched_[index(id)];
    };
    const bool by_row = op->share != Share::Pieces;
    const uint8_t read = read_touch(op->share), write = write_touch(op->share);
    for (int id : op->reads) op->barrier |= (touched(id) & kAnyWrite & ~(by_row ? write : 0)) != 0;
    for (int id : op->writes) op->barrier |= (touched(id) & kAny & ~(by_row ? read | write : 0)) != 0;
    if (op->barrier) std::fill(touched_.begin(), touched_.end(), uint8_t{0});
    for (int id : op->reads) touched(id) |= read;
    for (int id : op->writes) touched(id) |= write;
    ops_.push_back(std::move(op));
}

BufferId Plan::input(int64_t width) {
    const BufferId id = make(width, Rows::Pass);
    get(id).input = true;
    return id;
}

BufferId Plan::embed(std::shared_ptr<const Table> table, float scale) {
    const BufferId id = make(table->cols, Rows::Pass);
    auto op = std::make_unique<EmbedOp>();
    op->table = std::move(table), op->factor = scale, op->out = &get(id);
    op->share = Share::PassRows, op->writes = {id};
    append(std::move(op));
    return id;
}

BufferId Plan::rope(int64_t pairs, std::vector<float> frequencies) {
    if (pairs % kLanes || static_cast<int64_t>(frequencies.size()) != pairs) throw InputError("RoPE needs one frequency a pair and pairs in multiples of 16");
    const BufferId id = make(2 * pairs, Rows::Pass);
    auto op = std::make_unique<RopeOp>();
    op->frequencies = std::move(frequencies), op->out = &get(id);
    op->share = Share::PassRows, op->writes = {id};
    append(std::move(op));
    return id;
}

BufferId Plan::norm(BufferId x, std::vector<float> weight, float eps) {
    if (!weight.empty() && static_cast<int64_t>(weight.size()) != get(x).width) throw InputError("a norm's weight must be as wide as its input");
    const BufferId id = make(get(x).width, get(x).rows);
    auto op = std::make_unique<NormOp>();
    op->weight = std::move(weight), op->eps = eps, op->x = &get(x), op->out = &get(id);
    op->share = by_rows(get(x)), op->reads = {x}, op->writes = {id};
    append(std::move(op));
    return id;
}

void Plan::heads(BufferId x, int64_t dim, std::vector<float> weight, float eps, BufferId rope) {
    Buffer& b = get(x);
    if (dim < kLanes || dim % kLanes || b.width % dim) throw InputError("heads must divide their vector, in multiples of 16");
    if (!weight.empty() && static_cast<int64_t>(weight.size()) != dim) throw InputError("a head norm's weight must be as wide as a head");
    if (rope >= 0 && get(rope).width > dim) throw InputError("a head cannot turn more pairs than half its width");
    auto op = std::make_unique<HeadsOp>();
    op->dim = dim, op->weight = std::move(weight), op->eps = eps, op->x = &b, op->rope = rope < 0 ? nullptr : &get(rope);
    op->share = by_rows(b), op->reads = {x}, op->writes = {x};
    if (rope >= 0) op->reads.push_back(rope);
    append(std::move(op));
}

std::vector<BufferId> Plan::project(BufferId x, std::vector<std::shared_ptr<const Weight>> weights) {
    return multiply(x, std::move(weights), 2, "project");
}

BufferId Plan::logits(BufferId x, std::shared_ptr<const Weight> weight) {
    if (weight->split) return split_logits(x, weight->split);
    return multiply(x, {std::move(weight)}, 1, "logits").front();
}

std::vector<BufferId> Plan::multiply(BufferId x, std::vector<std::shared_ptr<const Weight>> weights, int digits, const char* label) {
    if (weights.empty()) throw InputError("a projection needs a matrix");
    auto op = std::make_unique<ProjectOp>();
    op->label = label;
    std::vector<BufferId> ids;
    for (const auto& w : weights) {
        read_by(w->matrix, x, digits);
        ids.push_back(make((w->matrix.rows + kLanes - 1) / kLanes * kLanes, get(x).rows));
        op->outs.push_back(&get(ids.back()));
    }
    op->x = &get(x), op->weights = std::move(weights);
    op->reads = {x}, op->writes = ids;
    append(std::move(op));
    return ids;
}

BufferId Plan::gated(BufferId x, std::shared_ptr<const Weight> gate, std::shared_ptr<const Weight> up) {
    if (gate->matrix.rows != up->matrix.rows || gate->matrix.rows % kLanes) throw InputError("gate and up must have the same number of rows, a multiple of 16");
    read_by(gate->matrix, x, 1), read_by(up->matrix, x, 1);
    const BufferId id = make(gate->matrix.rows, get(x).rows);
    auto op = std::make_unique<GatedOp>();
    op->x = &get(x), op->gate = std::move(gate), op->up = std::move(up), op->out = &get(id);
    op->reads = {x}, op->writes = {id};
    append(std::move(op));
    return id;
}

BufferId Plan::gelu_times(BufferId gate, BufferId x, int64_t column) {
    const Buffer &g = get(gate), &b = get(x);
    if (column < 0 || column % kLanes || column + g.width > b.width) throw InputError("the columns to multiply with are not there");
    const BufferId id = make(g.width, g.rows);
    auto op = std::make_unique<GeluTimesOp>();
    op->gate = &get(gate), op->x = &get(x), op->column = column, op->out = &get(id);
    op->share = by_rows(get(gate)), op->reads = {gate, x}, op->writes = {id};
    append(std::move(op));
    return id;
}

void Plan::add(BufferId x, BufferId y, float scale) {
    if (get(x).width != get(y).width) throw InputError("only vectors of the same width can be added");
    auto op = std::make_unique<AddOp>();
    op->x = &get(x), op->y = &get(y), op->factor = scale, op->norm = false;
    op->share = by_rows(get(x)), op->reads = {x, y}, op->writes = {x};
    append(std::move(op));
}

void Plan::add_norm(BufferId x, BufferId y, std::vector<float> weight, float eps, float scale) {
    if (get(x).width != get(y).width) throw InputError("only vectors of the same width can be added");
    if (!weight.empty() && static_cast<int64_t>(weight.size()) != get(x).width) throw InputError("a norm's weight must be as wide as its input");
    auto op = std::make_unique<AddOp>();
    op->x = &get(x), op->y = &get(y), op->factor = scale, op->norm = true, op->weight = std::move(weight), op->eps = eps;
    op->share = by_rows(get(x)), op->reads = {x}, op->writes = {x, y};
    append(std::move(op));
}

void Plan::scale(BufferId x, float factor) {
    auto op = std::make_unique<ScaleOp>();
    op->x = &get(x), op->factor = factor;
    op->share = by_rows(get(x)), op->reads = {x}, op->writes = {x};
    append(std::move(op));
}

void Plan::remember(int layer, BufferId k, BufferId v) {
    auto op = std::make_unique<RememberOp>();
    op->layer = layer, op->k = &get(k), op->v = &get(v);
    op->share = Share::PassRows, op->reads = {k, v}, op->writes = {-1 - layer};
    append(std::move(op));
}

BufferId Plan::attend(BufferId q, int layer, const KvLayer& shape, float scale, int64_t behind) {
    if (shape.head_dim < 1 || shape.head_dim % kKvBlock || shape.kv_heads < 1)
        throw InputError("attention needs KV heads, of a size that is a multiple of 32");
    if (get(q).width % shape.head_dim || (get(q).width / shape.head_dim) % shape.kv_heads)
        throw InputError("query heads must be a multiple of the KV heads, of the same size");
    const BufferId id = make(get(q).width, Rows::Pass);
    auto op = std::make_unique<AttendOp>();
    op->q = &get(q), op->out = &get(id), op->layer = layer, op->shape = shape, op->heads = get(q).width / shape.head_dim;
    op->factor = scale, op->behind = behind;
    op->scratch.resize(pool_->size());
    for (auto& s : op->scratch) {
        s.q.resize(kMaxQueries * shape.head_dim), s.out.resize(kMaxQueries * shape.head_dim);
        s.weights.resize(kMaxQueries * kChunkPositions);
    }
    // The parts have a buffer's place in the account of who touches what, so that no op overwrites them before they are merged.
    if (!parts_) parts_ = std::make_shared<AttendParts>(), parts_id_ = make(kLanes, Rows::Pass);
    op->parts = parts_;
    op->reads = {q, -1 - layer}, op->writes = {id, parts_id_};
    auto merge = std::make_unique<MergeOp>();
    merge->attend = op.get(), merge->reads = {id, parts_id_}, merge->writes = {id};
    append(std::move(op));
    append(std::move(merge));
    return id;
}

BufferId Plan::copy(BufferId x) {
    const BufferId id = make(get(x).width, get(x).rows);
    auto op = std::make_unique<CopyOp>();
    op->x = &get(x), op->out = &get(id);
    op->share = by_rows(get(x)), op->reads = {x}, op->writes = {id};
    append(std::move(op));
    return id;
}

BufferId Plan::concat(BufferId a, BufferId b) {
    const BufferId id = make(get(a).width + get(b).width, get(a).rows);
    auto op = std::make_unique<ConcatOp>();
    op->a = &get(a), op->b = &get(b), op->out = &get(id);
    op->share = by_rows(get(a)), op->reads = {a, b}, op->writes = {id};
    append(std::move(op));
    return id;
}

BufferId Plan::outputs(BufferId x) {
    const BufferId id = make(get(x).width, Rows::Outputs);
    auto op = std::make_unique<OutputsOp>();
    op->x = &get(x), op->out = &get(id);
    op->share = Share::OutputRows, op->reads = {x}, op->writes = {id};
    append(std::move(op));
    return id;
}

void Plan::softcap(BufferId x, float cap) {
    for (auto& [logits, capped] : capped_) *capped |= logits == x;
    auto op = std::make_unique<SoftcapOp>();
    op->x = &get(x), op->cap = cap;
    op->reads = {x}, op->writes = {x};
    append(std::move(op));
}

void Plan::run(Pass& pass) {
    if (!finished_) throw InputError("a plan must be finished before it runs");
    if (pass.rows < 1 || pass.rows > max_rows_) throw InputError("a pass must have between 1 and " + std::to_string(max_rows_) + " rows");
    if (static_cast<int>(pass.outputs.size()) > max_outputs_) throw InputError("a pass can have at most " + std::to_string(max_outputs_) + " outputs");
    if (!loops_) loops_ = std::make_unique<Loops>(pool_->size(), ops_.size());
    loops_->reset();
    for (const auto& op : ops_) op->prepare(pass);
    pass.experts_read = 0;
    seconds_.resize(ops_.size());
    using Clock = std::chrono::steady_clock;
    pool_->run([&](int thread) {
        auto before = profiling_ && thread == 0 ? Clock::now() : Clock::time_point{};
        for (size_t i = 0; i < ops_.size(); i++) {
            if (ops_[i]->barrier) pool_->barrier();
            ops_[i]->run({*this, pass, *pool_, *kernels_.layer, *kernels_.matmul, *kernels_.sampling, thread, (*loops_)[i]});
            if (profiling_ && thread == 0) {
                auto now = Clock::now();
                seconds_[i] += std::chrono::duration<double>(now - before).count();
                before = now;
            }
        }
    });
}

int Plan::barriers() const {
    int count = 0;
    for (const auto& op : ops_) count += op->barrier;
    return count;
}

std::vector<std::pair<std::string, double>> Plan::profile() {
    std::map<std::string, double> by_name;
    for (size_t i = 0; i < seconds_.size(); i++) by_name[ops_[i]->name()] += std::exchange(seconds_[i], 0.0);
    return {by_name.begin(), by_name.end()};
}

}  // namespace gmtp
