// Recording plans and running them: what ops/native.py and engine/ call.
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <tuple>

#include "bindings.h"
#include "gmtp/error.h"
#include "gmtp/drafter.h"
#include "gmtp/runner.h"

namespace gmtp {
namespace {

using namespace nb::literals;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using State = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Acceptances = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Masks = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using WeightPtr = std::shared_ptr<const Weight>;

std::span<const uint8_t> view(const Bytes& b) { return {b.data(), b.size()}; }
std::span<const int32_t> view(const Tokens& t) { return {t.data(), t.size()}; }

std::vector<std::string> strings(const std::vector<nb::bytes>& all) {
    std::vector<std::string> result;
    for (const nb::bytes& one : all) result.emplace_back(one.c_str(), one.size());
    return result;
}

Floats copy_rows(int count, int64_t width, auto&& row_of) {
    auto* data = new float[static_cast<size_t>(count) * width];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    for (int i = 0; i < count; i++) std::copy_n(row_of(i), width, data + i * width);
    return Floats(data, {static_cast<size_t>(count), static_cast<size_t>(width)}, owner);
}

using TopLogprobs = std::vector<std::pair<int32_t, float>>;
using Choice = std::tuple<int32_t, float, TopLogprobs>;

}  // namespace

void bind_plan(nb::module_& m) {
    nb::class_<ThreadPool>(m, "ThreadPool", "Threads that run passes; share one between a model's plans.")
        .def(nb::init<int>(), "threads"_a)
        .def_prop_ro("size", &ThreadPool::size);

    nb::class_<Weight>(m, "Weight", "A matrix packed for the kernels.")
        .def_static("pack", [](const std::string& type, Bytes source, int64_t rows, int64_t cols, ThreadPool& pool,
                               const std::function<void(size_t, size_t)>& done) {
                return Weight::pack(weight_type(type), source.data(), source.size(), rows, cols, pool, done);
            }, "type"_a, "source"_a, "rows"_a, "cols"_a, "pool"_a, "done"_a,
            "From the bytes of a checkpoint's tensor [rows, cols] of a GGUF type. done(begin, end) is told which of those "
            "bytes are not needed any more, as packing goes on.")
        .def_static("convert", [](const std::string& from, const std::string& to, Bytes source, int64_t rows, int64_t cols,
                                  ThreadPool& pool, const std::function<void(size_t, size_t)>& done) {
                return Weight::convert(weight_type(from), weight_type(to), source.data(), source.size(), rows, cols, pool, done);
            }, "type"_a, "to"_a, "source"_a, "rows"_a, "cols"_a, "pool"_a, "done"_a,
            "The same, quantised as another type on the way.")
        .def("unpack_rows", [](const Weight& w, int64_t row, int64_t count) {
                if (row < 0 || count < 0 || row + count > w.matrix.rows) throw InputError("the rows are not within the matrix");
                std::vector<float> values(static_cast<size_t>(w.matrix.cols));
                return copy_rows(static_cast<int>(count), w.matrix.cols, [&](int i) {
                    w.read(row + i, values.data());
                    return values.data();
                });
            }, "row"_a, "count"_a, "float32 [count, cols]: the exact values.")
        .def_static("pack_head", [](Bytes source, int64_t rows, int64_t cols, ThreadPool& pool,
                                    const std::function<void(size_t, size_t)>& done) {
                return pack_head(source.data(), source.size(), rows, cols, pool, done);
            }, "source"_a, "rows"_a, "cols"_a, "pool"_a, "done"_a,
            "An output embedding of Q8_0 in two parts, of which finding the best tokens mostly reads one.")
        .def_static("mapped", [](const std::string& type, const Bytes& data, int64_t rows, int64_t cols) {
                return Weight::mapped(weight_type(type), view(data), rows, cols, std::make_shared<Bytes>(data));
            }, "type"_a, "data"_a, "rows"_a, "cols"_a, "One whose `data` is in memory already, used where it is.")
        .def_static("map_head", [](const Bytes& data, int64_t rows, int64_t cols) {
                return map_head(view(data), rows, cols, std::make_shared<Bytes>(data));
            }, "data"_a, "rows"_a, "cols"_a, "The same of an output embedding of Q8_0 in two parts.")
        .def_static("packed_bytes", [](const std::string& type, int64_t rows, int64_t cols) {
                return packed_bytes(weight_type(type), rows, cols);
            }, "type"_a, "rows"_a, "cols"_a, "How many bytes the `data` of such a matrix has.")
        .def_static("head_bytes", &head_bytes, "rows"_a, "cols"_a, "The same of an output embedding of Q8_0 in two parts.")
        .def_prop_ro("data", [](const Weight& w) {
                return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(w.data().data(), {w.data().size()}, nb::handle());
            }, nb::rv_policy::reference_internal, "uint8 [nbytes]: as it is packed, see native/include/gmtp/matrix.h.")
        .def_prop_ro("rows", [](const Weight& w) { return w.matrix.rows; })
        .def_prop_ro("cols", [](const Weight& w) { return w.matrix.cols; })
        .def_prop_ro("type", [](const Weight& w) { return weight_type_name(w.matrix.type); })
        .def_prop_ro("nbytes", [](const Weight& w) { return w.bytes; });

    nb::class_<Table>(m, "Table", "Rows looked up one at a time.")
        .def_static("packed", [](WeightPtr w) {
            return std::make_shared<Table>(Table{w->matrix.type, w->matrix.rows, w->matrix.cols, nullptr, w});
        }, "weight"_a)
        .def_static("mapped", [](const std::string& type, Bytes source, int64_t rows, int64_t cols) {
            const WeightType t = weight_type(type);
            if (rows < 1 || cols < 1 || cols % type_block(t) || file_row_bytes(t, cols) * rows != source.size())
                throw InputError("a tensor's bytes do not match its shape");
            return std::make_shared<Table>(Table{t, rows, cols, source.data(), nullptr});
        }, "type"_a, "source"_a, "rows"_a, "cols"_a, nb::keep_alive<0, 2>(), "A tensor left in its mapped file.");

    nb::class_<KvCache>(m, "KvCache", "Keys and values of many sequences, in pages.")
        .def("__init__", [](KvCache* self, const std::string& type, const std::vector<std::tuple<int64_t, int64_t, int64_t>>& layers,
                            int64_t context, int64_t rollback, int64_t memory_limit) {
                const std::map<std::string, KvType> types{{"f16", KvType::F16}, {"f32", KvType::F32}, {"q8_0", KvType::Q8_0}};
                if (!types.contains(type)) throw InputError("a KV cache is of type f16, f32 or q8_0");
                std::vector<KvLayer> shapes;
                for (auto [kv_heads, head_dim, window] : layers) shapes.push_back({kv_heads, head_dim, window});
                new (self) KvCache(types.at(type), std::move(shapes), context, rollback, memory_limit);
            }, "type"_a, "layers"_a, "context"_a, "rollback"_a = 64, "memory_limit"_a = 0,
            "layers: (kv_heads, head_dim, window or 0) of each layer; without heads it keeps nothing.")
        .def("create", &KvCache::create).def("release", &KvCache::release, "sequence"_a)
        .def("length", &KvCache::length, "sequence"_a).def("floor", &KvCache::floor, "sequence"_a)
        .def("truncate", &KvCache::truncate, "sequence"_a, "length"_a)
        .def("read", [](const KvCache& cache, int sequence, int layer, int64_t begin, int64_t end) {
                const KvLayer& shape = cache.layer(layer);
                const size_t count = static_cast<size_t>(std::max<int64_t>(end - begin, 0)), width = static_cast<size_t>(shape.kv_heads * shape.head_dim);
                std::vector<float> keys(count * width), values(count * width);
                cache.read(sequence, layer, begin, end, keys.data(), values.data());
                auto rows = [&](const std::vector<float>& all) {
                    return copy_rows(static_cast<int>(count), static_cast<int64_t>(width), [&](int i) { return all.data() + i * width; });
                };
                return std::pair(rows(keys), rows(values));
            }, "sequence"_a, "layer"_a, "begin"_a, "end"_a,
            "Keys and values of a layer at positions [begin, end): float32 [positions, kv_heads * head_dim] each.")
        .def("name", [](KvCache& cache, int sequence, int64_t first, const std::vector<nb::bytes>& names) {
                cache.name(sequence, first, strings(names));
            }, "sequence"_a, "first"_a, "names"_a, "Names full pages of a sequence, from its page `first` on.")
        .def("adopt", [](KvCache& cache, int sequence, const std::vector<nb::bytes>& names) {
                return cache.adopt(sequence, strings(names));
            }, "sequence"_a, "names"_a, "Starts an empty sequence with the pages of these names, as far as it can; its length.")
        .def("fits", [](KvCache& cache, const std::vector<std::pair<int, int64_t>>& wanted, int64_t rows) {
                return cache.fits(wanted, rows);
            }, "wanted"_a, "rows"_a, "Whether there is memory for these further positions, (sequence, count), all together.")
        .def("bytes_for", &KvCache::bytes_for, "length"_a, "rows"_a)
        .def("set_limit", &KvCache::set_limit, "bytes"_a, "0: none.")
        .def_prop_ro("limit", &KvCache::limit)
        .def_prop_ro("context", &KvCache::context)
        .def_prop_ro("bytes_in_use", &KvCache::bytes_in_use).def_prop_ro("bytes_allocated", &KvCache::bytes_allocated);

    nb::class_<Plan>(m, "Plan", "A model recorded as a list of native ops.")
        .def("__init__", [](Plan* self, std::shared_ptr<ThreadPool> pool, const std::string& isa, int max_rows, int max_outputs) {
                new (self) Plan(std::move(pool), kernels_for(isa), max_rows, max_outputs);
            }, "pool"_a, "isa"_a, "max_rows"_a, "max_outputs"_a)
        .def("input", &Plan::input, "width"_a)
        .def("embed", [](Plan& p, std::shared_ptr<Table> t, float scale) { return p.embed(std::move(t), scale); },
             "table"_a, "scale"_a, nb::keep_alive<1, 2>())
        .def("rope", [](Plan& p, std::vector<float> frequencies) {
                const auto pairs = static_cast<int64_t>(frequencies.size());
                return p.rope(pairs, std::move(frequencies));
            }, "frequencies"_a)
        .def("norm", &Plan::norm, "x"_a, "weight"_a, "eps"_a)
        .def("heads", &Plan::heads, "x"_a, "dim"_a, "weight"_a, "eps"_a, "rope"_a)
        .def("project", [](Plan& p, BufferId x, const std::vector<std::shared_ptr<Weight>>& w) {
                return p.project(x, {w.begin(), w.end()});
            }, "x"_a, "weights"_a)
        .def("logits", [](Plan& p, BufferId x, std::shared_ptr<Weight> w) { return p.logits(x, std::move(w)); }, "x"_a, "weight"_a)
        .def("gated", [](Plan& p, BufferId x, std::shared_ptr<Weight> gate, std::shared_ptr<Weight> up) {
                return p.gated(x, std::move(gate), std::move(up));
            }, "x"_a, "gate"_a, "up"_a)
        .def("gelu_times", &Plan::gelu_times, "gate"_a, "x"_a, "column"_a)
        .def("add", &Plan::add, "x"_a, "y"_a, "scale"_a)
        .def("scale", &Plan::scale, "x"_a, "factor"_a)
        .def("add_norm", &Plan::add_norm, "x"_a, "y"_a, "weight"_a, "eps"_a, "scale"_a)
        .def("remember", &Plan::remember, "layer"_a, "k"_a, "v"_a)
        .def("attend", [](Plan& p, BufferId q, int layer, int64_t kv_heads, int64_t head_dim, int64_t window, float scale, int64_t behind) {
                return p.attend(q, layer, {kv_heads, head_dim, window}, scale, behind);
            }, "q"_a, "layer"_a, "kv_heads"_a, "head_dim"_a, "window"_a, "scale"_a, "behind"_a = 0)
        .def("copy", &Plan::copy, "x"_a)
        .def("concat", &Plan::concat, "a"_a, "b"_a)
        .def("experts", [](Plan& p, BufferId x, BufferId scores, std::shared_ptr<Weight> gate_up, std::shared_ptr<Weight> down,
                           std::vector<float> scales, int active) {
                return p.experts(x, scores, std::move(gate_up), std::move(down), std::move(scales), active);
            }, "x"_a, "scores"_a, "gate_up"_a, "down"_a, "scales"_a, "active"_a)
        .def("centroid_logits", [](Plan& p, BufferId x, BufferId scores, std::shared_ptr<Weight> weight,
                                   std::vector<int32_t> tokens, int64_t count, int active) {
                return p.centroid_logits(x, scores, std::move(weight), std::move(tokens), count, active);
            }, "x"_a, "scores"_a, "weight"_a, "tokens"_a, "count"_a, "active"_a,
            "weight: each centroid's rows one after another; tokens: the token of each row, -1 for none.")
        .def("outputs", &Plan::outputs, "x"_a)
        .def("softcap", &Plan::softcap, "x"_a, "cap"_a)
        .def("profile", &Plan::profile, "Seconds of thread 0 by kind of op since the last call.")
        .def("set_profiling", &Plan::set_profiling, "on"_a)
        .def_prop_ro("barriers", &Plan::barriers)
        .def_prop_ro("arena_bytes", &Plan::arena_bytes)
        .def_prop_ro("max_rows", &Plan::max_rows).def_prop_ro("max_outputs", &Plan::max_outputs);

    nb::class_<Runner>(m, "Runner", "Runs a plan over sequences of a cache, and samples.")
        .def(nb::init<std::shared_ptr<Plan>, std::shared_ptr<KvCache>, BufferId, BufferId, int64_t>(), "plan"_a, "cache"_a,
             "logits"_a, "hidden"_a, "vocab"_a)
        .def("forward", [](Runner& r, const std::vector<std::tuple<int, Tokens, int, SampleParams>>& feeds) {
                std::vector<Feed> native;
                for (const auto& [sequence, tokens, outputs, params] : feeds) native.push_back({sequence, view(tokens), outputs, params});
                nb::gil_scoped_release release;
                r.forward(native);
            }, "feeds"_a,
            "One pass over (sequence, tokens int32, number of last tokens whose output is wanted, how those are sampled).")
        .def("choose", [](Runner& r, const std::vector<std::tuple<SampleParams, Tokens, size_t, Masks>>& feeds) {
                std::vector<Choosing> how;
                for (const auto& [params, seen, prompt, allowed] : feeds)
                    how.push_back({params, view(seen), prompt, {allowed.data(), allowed.size()}, allowed.shape(0)});
                std::vector<Choice> choices;
                std::vector<Sampled> sampled;
                {
                    nb::gil_scoped_release release;
                    sampled = r.sample(how);
                }
                for (const Sampled& s : sampled) {
                    TopLogprobs top;
                    for (const auto& t : s.top) top.emplace_back(t.token, t.logprob);
                    choices.emplace_back(s.token, s.logprob, std::move(top));
                }
                return choices;
            }, "feeds"_a, "Samples the last pass's outputs, with (params, seen, how many of these are the prompt's, "
            "allowed uint32 [masks, words]) for each of its feeds, the masks being of its last outputs: (token, its log probability, the likeliest tokens').")
        .def("logits", [](Runner& r) {
                if (!r.exact()) throw InputError("the last pass computed only the largest logits exactly");
                return copy_rows(r.outputs(), r.vocab(), [&](int i) { return r.logits(i); });
            }, "Of the last pass, if it asked for all: float32 [outputs, vocab].")
        .def("logit", [](Runner& r, int output, int32_t token) {
                if (output < 0 || output >= r.outputs() || token < 0 || token >= r.vocab()) throw InputError("there is no such logit");
                return r.logits(output)[token];
            }, "output"_a, "token"_a, "One of the last pass; exact if the settings of its feed read all.")
        .def("experts_read", &Runner::experts_read, "Experts whose weights the last pass read, in all layers together.")
        .def("hidden", [](Runner& r) { return copy_rows(r.outputs(), r.hidden_size(), [&](int i) { return r.hidden(i); }); },
             "Of the last pass, after the final norm: float32 [outputs, hidden].");

    m.attr("SURENESS_LEVELS") = kSurenessLevels;
    m.def("sureness", &sureness, "probability"_a, "How sure a drafter is of a token: 0 to SURENESS_LEVELS - 1.");

    nb::class_<Drafter>(m, "Drafter", "Runs a drafter's plan over the target's cache.")
        .def("__init__", [](Drafter* self, std::shared_ptr<Plan> plan, std::shared_ptr<KvCache> cache, BufferId state,
                            std::vector<BufferId> logits, BufferId next, int64_t vocab) {
                new (self) Drafter(std::move(plan), std::move(cache), {state, std::move(logits), next}, vocab);
            }, "plan"_a, "cache"_a, "state"_a, "logits"_a, "next"_a, "vocab"_a, "next: -1 for parallel heads.")
        .def("draft", [](Drafter& d, int sequence, int32_t token, State state, int depth, const SampleParams& params, Tokens seen,
                         size_t prompt, const std::optional<std::tuple<Acceptances, State, State>>& ends) {
                DraftEnds bars;
                if (ends) {
                    const auto& [acceptance, keep, go_on] = *ends;
                    bars = {{acceptance.data(), acceptance.size()}, {keep.data(), keep.size()}, {go_on.data(), go_on.size()}};
                }
                nb::gil_scoped_release release;
                const Draft draft = d.draft(sequence, token, {state.data(), state.size()}, depth, params, view(seen), prompt, bars);
                return std::tuple(draft.tokens, draft.sureness, draft.left_out);
            }, "sequence"_a, "token"_a, "state"_a, "depth"_a, "params"_a, "seen"_a, "prompt"_a = 0, "ends"_a = nb::none(),
            "Up to `depth` tokens to follow `token`, which was sampled from the hidden state float32 [hidden]; how sure the "
            "drafter was of each and of the one that it left out; and that one, if it made it. ends: acceptance [depths, "
            "SURENESS_LEVELS], and for each depth the least product of it that keeps a token, and that goes on to make it.")
        .def("logits", [](Drafter& d, size_t head) {
                const auto scores = d.logits(head);
                const int32_t* tokens = d.candidates(head);
                std::vector<std::pair<int32_t, float>> result;
                for (size_t i = 0; i < scores.size(); i++)
                    if (!tokens || tokens[i] >= 0) result.emplace_back(tokens ? tokens[i] : static_cast<int32_t>(i), scores[i]);
                return result;
            }, "head"_a = 0, "Of the last step: (token, score) of every token that was scored.")
        .def("next_state", [](Drafter& d) {
                const auto state = d.next_state();
                return copy_rows(1, static_cast<int64_t>(state.size()), [&](int) { return state.data(); });
            }, "The hidden state after the last step: float32 [1, hidden].");

    nb::class_<SampleParams>(m, "SampleParams")
        .def("__init__", [](SampleParams* self, float temperature, int32_t top_k, float top_p, float min_p, float repetition_penalty,
                            uint64_t seed, int32_t logprobs, float presence_penalty, float frequency_penalty,
                            const Biases& logit_bias) {
                new (self) SampleParams{temperature, top_k, top_p, min_p, repetition_penalty, seed, logprobs,
                                        presence_penalty, frequency_penalty, native_biases(logit_bias)};
            }, nb::kw_only(), "temperature"_a = 0.0f, "top_k"_a = 0, "top_p"_a = 1.0f, "min_p"_a = 0.0f,
            "repetition_penalty"_a = 1.0f, "seed"_a = 0, "logprobs"_a = 0, "presence_penalty"_a = 0.0f, "frequency_penalty"_a = 0.0f,
            "logit_bias"_a = Biases(), "logit_bias: (token, value) to be added.");
}

}  // namespace gmtp
