// A mixture of experts. Each row chooses some experts; the (row, expert) pairs of a pass, the slots, are put in the order
// of their experts, so that a chosen expert's weights are read once for all rows that chose it, and others not at all. A
// row's result is the sum over its own experts, best first, whatever the other rows chose.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "gmtp/error.h"
#include "ops.h"

namespace gmtp {
namespace {

// What the rows of a pass chose; shared by the ops below.
struct Routes {
    int64_t experts;
    int active;
    std::vector<int32_t> expert;   // [row][active], best first
    std::vector<float> weight;     // [row][active]
    std::vector<int32_t> slot;     // [row][active]
    std::vector<int32_t> row_of;   // [slot]
    std::vector<int32_t> first;    // [experts + 1]: the slots of expert e are [first[e], first[e + 1])
    std::vector<int32_t> chosen;   // the experts that have slots
};

struct RouteOp : Op {
    std::shared_ptr<Routes> routes;
    const Buffer* scores;
    std::vector<float> scales;
    struct Scratch { std::vector<float> p; std::vector<int32_t> order; };
    mutable std::vector<Scratch> scratch;  // [thread], each [experts]
    const char* name() const override { return "route"; }

    void run(const Run& r) const override {
        const auto count = static_cast<size_t>(routes->experts), active = static_cast<size_t>(routes->active);
        auto& [p, order] = scratch[r.thread];
        r.each_row(*scores, [&](int i) {
            std::copy_n(row(*scores, i), count, p.begin());
            r.layer.softmax(p.data(), static_cast<int64_t>(count));
            std::iota(order.begin(), order.end(), 0);
            std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(active), order.end(),
                              [&](int32_t a, int32_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; });
            float total = 0;
            for (size_t k = 0; k < active; k++) total += p[order[k]];
            for (size_t k = 0; k < active; k++) {
                routes->expert[i * active + k] = order[k];
                routes->weight[i * active + k] = p[order[k]] / total * scales[order[k]];
            }
        });
    }
};

struct ArrangeOp : Op {
    std::shared_ptr<Routes> routes;
    const char* name() const override { return "arrange"; }

    void run(const Run& r) const override {
        r.each_piece(1, [&](int64_t) {
            auto& first = routes->first;
            const int pairs = r.pass.rows * routes->active;
            std::fill(first.begin(), first.end(), 0);
            for (int i = 0; i < pairs; i++) first[routes->expert[i] + 1]++;
            routes->chosen.clear();
            for (int32_t e = 0; e < routes->experts; e++)
                if (first[e + 1]) routes->chosen.push_back(e);
            r.pass.experts_read += static_cast<int64_t>(routes->chosen.size());
            std::partial_sum(first.begin(), first.end(), first.begin());
            for (int i = 0; i < pairs; i++) {  // first[e] moves on to where the next expert's slots start
                const int32_t slot = first[routes->expert[i]]++;
                routes->slot[i] = slot, routes->row_of[slot] = i / routes->active;
            }
            std::copy_backward(first.begin(), first.end() - 1, first.end());
            first[0] = 0;
        });
    }
};

struct GatherOp : Op {
    std::shared_ptr<Routes> routes;
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "gather"; }

    void run(const Run& r) const override {
        r.each_piece(r.rows(*out), [&](int64_t slot) {
            std::memcpy(row(*out, slot), row(*x, routes->row_of[slot]), out->width * sizeof(float));
            r.wrote(*out, slot);
        });
    }
};

// Pieces of the chosen experts' weights: body(expert, first group, past the last) within an expert's `groups`.
template <class F> void each_expert_piece(const Run& r, const Routes& routes, int64_t groups, int64_t step, F&& body) {
    const int64_t per_expert = (groups + step - 1) / step;
    r.each_piece(static_cast<int64_t>(routes.chosen.size()) * per_expert, [&](int64_t piece) {
        const int64_t begin = piece % per_expert * step;
        body(routes.chosen[piece / per_expert], begin, std::min(begin + step, groups));
    });
}

struct GatedExpertsOp : Op {
    std::shared_ptr<Routes> routes;
    std::shared_ptr<const Weight> gate_up;
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "gated experts"; }

    void run(const Run& r) const override {
        const Matrix& m = gate_up->matrix;
        const int64_t groups = out->width / kGroupRows, step = std::max<int64_t>(1, piece_groups(m) / 4) * 2;
        each_expert_piece(r, *routes, groups, step, [&](int64_t e, int64_t begin, int64_t end) {
            for (int64_t g = begin; g < end; g += 2)
                gated_groups(r, m, e * 2 * groups + g, m, (e * 2 + 1) * groups + g, std::min<int64_t>(2, end - g), *x,
                             routes->first[e], routes->first[e + 1], *out, g * kGroupRows);
        });
    }
};

struct DownExpertsOp : Op {
    std::shared_ptr<Routes> routes;
    std::shared_ptr<const Weight> down;
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "down experts"; }

    void run(const Run& r) const override {
        const Matrix& m = down->matrix;
        const int64_t groups = out->width / kGroupRows;
        each_expert_piece(r, *routes, groups, piece_groups(m), [&](int64_t e, int64_t begin, int64_t end) {
            r.matmul.matmul(m, e * groups + begin, e * groups + end, x->data, routes->first[e], routes->first[e + 1],
                            out->data.x - e * out->width, out->data.stride);
        });
    }
};

struct CombineOp : Op {
    std::shared_ptr<Routes> routes;
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "combine"; }

    void run(const Run& r) const override {
        r.each_row(*out, [&](int i) {
            std::memset(row(*out, i), 0, out->width * sizeof(float));
            for (int k = i * routes->active; k < (i + 1) * routes->active; k++)
                r.layer.add_product(row(*x, routes->slot[k]), routes->weight[k], out->width, row(*out, i));
            r.wrote(*out, i);
        });
    }
};

}  // namespace

BufferId Plan::experts(BufferId x, BufferId scores, std::shared_ptr<const Weight> gate_up, std::shared_ptr<const Weight> down,
                       std::vector<float> scales, int active) {
    const auto count = static_cast<int64_t>(scales.size());
    const int64_t hidden = count ? down->matrix.rows / count : 0, width = down->matrix.cols;
    if (count < 1 || active < 1 || active > count) throw InputError("between one and all of the experts must be active");
    if (get(x).rows != Rows::Pass || get(scores).width < count) throw InputError("experts need a score each for every row");
    if (gate_up->matrix.rows != count * 2 * width || down->matrix.rows != count * hidden || width % kGroupRows || hidden % kGroupRows)
        throw InputError("the experts' matrices do not fit each other, or are not multiples of 16 wide");

    auto routes = std::make_shared<Routes>();
    const auto slots = static_cast<size_t>(max_rows_) * active;
    routes->experts = count, routes->active = active;
    for (auto* list : {&routes->expert, &routes->slot, &routes->row_of}) list->resize(slots);
    routes->weight.resize(slots);
    routes->first.resize(count + 1);
    routes->chosen.reserve(count);
    const BufferId routed = make(kGroupRows, Rows::Pass);  // stands for the routes where ops say what they touch

    auto slot_buffer = [&](int64_t values) {
        const BufferId id = make(values, Rows::Pass);
        get(id).per_row = active;
        return id;
    };
    auto record = [&](auto op, std::vector<int> reads, std::vector<int> writes, Share share = Share::Pieces) {
        op->routes = routes, op->reads = std::move(reads), op->writes = std::move(writes), op->share = share;
        append(std::move(op));
    };

    auto route = std::make_unique<RouteOp>();
    route->scores = &get(scores), route->scales = std::move(scales);
    route->scratch.resize(pool_->size(), {std::vector<float>(count), std::vector<int32_t>(count)});
    record(std::move(route), {scores}, {routed}, Share::PassRows);
    record(std::make_unique<ArrangeOp>(), {routed}, {routed});

    const BufferId gathered = slot_buffer(get(x).width);
    read_by(gate_up->matrix, gathered, 1);
    auto gather = std::make_unique<GatherOp>();
    gather->x = &get(x), gather->out = &get(gathered);
    record(std::move(gather), {x, routed}, {gathered});

    const BufferId inner = slot_buffer(width);
    read_by(down->matrix, inner, 2);
    auto gated = std::make_unique<GatedExpertsOp>();
    gated->gate_up = std::move(gate_up), gated->x = &get(gathered), gated->out = &get(inner);
    record(std::move(gated), {gathered, routed}, {inner});

    const BufferId results = slot_buffer(hidden);
    auto project = std::make_unique<DownExpertsOp>();
    project->down = std::move(down), project->x = &get(inner), project->out = &get(results);
    record(std::move(project), {inner, routed}, {results});

    const BufferId id = make(hidden, Rows::Pass);
    auto combine = std::make_unique<CombineOp>();
    combine->x = &get(results), combine->out = &get(id);
    record(std::move(combine), {results, routed}, {id}, Share::PassRows);
    return id;
}

}  // namespace gmtp
