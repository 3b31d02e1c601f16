// The centroid head: of a large vocabulary, only the tokens of the centroids that score highest are scored.
#include <algorithm>
#include <limits>
#include <numeric>

#include "gmtp/error.h"
#include "ops.h"

namespace gmtp {

struct ChooseCentroidsOp : Op {
    const Buffer* scores;
    int64_t count, per;               // centroids, and weight rows of each
    int active;
    std::vector<int32_t> tokens;      // [count][per]
    mutable std::vector<int32_t> chosen, candidates;  // [row][active], and their tokens: [row][active][per]
    mutable std::vector<std::vector<int32_t>> scratch;  // [thread][count]
    const char* name() const override { return "choose centroids"; }

    void run(const Run& r) const override {
        auto& order = scratch[r.thread];
        r.each_row(*scores, [&](int i) {
            const float* s = row(*scores, i);
            std::iota(order.begin(), order.end(), 0);
            std::partial_sort(order.begin(), order.begin() + active, order.end(),
                              [&](int32_t a, int32_t b) { return s[a] != s[b] ? s[a] > s[b] : a < b; });
            for (int64_t k = 0; k < active; k++) {
                chosen[i * active + k] = order[k];
                std::copy_n(&tokens[order[k] * per], per, &candidates[(i * active + k) * per]);
            }
        });
    }
};

namespace {

struct CentroidLogitsOp : Op {
    const ChooseCentroidsOp* choice;
    std::shared_ptr<const Weight> weight;
    const Buffer* x;
    Buffer* out;
    const char* name() const override { return "centroid logits"; }

    void run(const Run& r) const override {
        const int64_t per = choice->per, active = choice->active;
        r.each_piece(r.rows(*out) * active, [&](int64_t piece) {
            const auto i = static_cast<int>(piece / active);
            const int64_t c = choice->chosen[piece], to = piece % active * per;
            r.matmul.matmul(weight->matrix, c * per / kGroupRows, (c + 1) * per / kGroupRows, x->data, i, i + 1,
                            out->data.x + to - c * per, out->data.stride);
            for (int64_t j = 0; j < per; j++)
                if (choice->tokens[c * per + j] < 0) row(*out, i)[to + j] = -std::numeric_limits<float>::infinity();
        });
    }
};

}  // namespace

BufferId Plan::centroid_logits(BufferId x, BufferId scores, std::shared_ptr<const Weight> weight, std::vector<int32_t> tokens,
                               int64_t count, int active) {
    const int64_t rows = weight->matrix.rows;
    if (count < 1 || get(scores).width < count) throw InputError("each centroid needs a score");
    if (active < 1 || active > count || rows % (count * kGroupRows) || static_cast<int64_t>(tokens.size()) != rows)
        throw InputError("each centroid needs the same number of rows, a multiple of 16, and each row its token");
    read_by(weight->matrix, x, 1);
    auto choose = std::make_unique<ChooseCentroidsOp>();
    ChooseCentroidsOp* choice = choose.get();
    choose->scores = &get(scores), choose->count = count, choose->per = rows / count, choose->active = active;
    choose->tokens = std::move(tokens);
    choose->scratch.assign(pool_->size(), std::vector<int32_t>(count));
    const int most = get(x).rows == Rows::Pass ? max_rows_ : max_outputs_;
    choose->chosen.resize(static_cast<size_t>(most) * active);
    choose->candidates.resize(static_cast<size_t>(most) * active * choose->per);
    const BufferId id = make(active * choose->per, get(x).rows), made = make(kGroupRows, get(x).rows);
    choose->share = get(x).rows == Rows::Pass ? Share::PassRows : Share::OutputRows;
    choose->reads = {scores}, choose->writes = {made};
    append(std::move(choose));
    auto op = std::make_unique<CentroidLogitsOp>();
    op->choice = choice, op->weight = std::move(weight), op->x = &get(x), op->out = &get(id);
    op->reads = {x, made}, op->writes = {id};
    append(std::move(op));
    choosers_.emplace_back(id, choice);
    return id;
}

const int32_t* Plan::candidates(BufferId id, int row) const {
    for (const auto& [buffer, choice] : choosers_)
        if (buffer == id) return &choice->candidates[static_cast<size_t>(row) * choice->active * choice->per];
    return nullptr;
}

}  // namespace gmtp
