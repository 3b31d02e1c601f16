#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <tuple>

#include "bindings.h"
#include "gmtp/kernels.h"
#include "gmtp/lookup.h"

namespace gmtp {
namespace {

using Logits = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = std::vector<int32_t>;
using Mask = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The sampler with memory of its own, for executors that hold their logits in Python and for tests.
struct Sampler {
    const SamplingKernels& kernels;
    Scratch scratch;

    std::tuple<int32_t, float, std::vector<std::tuple<int32_t, float>>> sample(
        Logits logits, int64_t position, float temperature, int32_t top_k, float top_p, float min_p,
        float repetition_penalty, uint64_t seed, int32_t logprobs, float presence_penalty, float frequency_penalty,
        const Biases& logit_bias, const Tokens& seen, const Tokens& drafted, size_t prompt, const std::optional<Mask>& allowed) {
        SampleParams params{temperature, top_k, top_p, min_p, repetition_penalty, seed, logprobs,
                            presence_penalty, frequency_penalty, native_biases(logit_bias)};
        Sampled s = gmtp::sample(kernels, logits.data(), static_cast<int64_t>(logits.shape(0)), params, position,
                                 {seen, drafted, prompt}, scratch,
                                 allowed ? std::span(allowed->data(), allowed->size()) : std::span<const uint32_t>());
        std::vector<std::tuple<int32_t, float>> top;
        for (const auto& t : s.top) top.emplace_back(t.token, t.logprob);
        return {s.token, s.logprob, std::move(top)};
    }
};

}  // namespace

void bind_sampler(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<Sampler>(m, "Sampler", "Samples tokens from rows of logits; keeps its working memory between calls.")
        .def("__init__", [](Sampler* self, const std::string& isa) { new (self) Sampler{*kernels_for(isa).sampling, {}}; },
             "isa"_a = "auto")
        .def("sample", &Sampler::sample, "logits"_a, "position"_a, nb::kw_only(), "temperature"_a = 0.0f, "top_k"_a = 0,
             "top_p"_a = 1.0f, "min_p"_a = 0.0f, "repetition_penalty"_a = 1.0f, "seed"_a = 0, "logprobs"_a = 0,
             "presence_penalty"_a = 0.0f, "frequency_penalty"_a = 0.0f, "logit_bias"_a = Biases(), "seen"_a = Tokens(),
             "drafted"_a = Tokens(), "prompt"_a = 0, "allowed"_a.none() = nb::none(),
             "The token at `position` from logits float32 [vocab], with its log probability and those of the `logprobs` "
             "likeliest tokens, likeliest first. logit_bias: (token, value); prompt: how many of `seen` are the prompt's. "
             "allowed: uint32 [words], a bit for each token that may be sampled; None: all may.")
        .def("gumbel", [](Sampler& self, uint64_t seed, int64_t position, int64_t count) {
                 auto* values = new std::vector<float>(count);
                 nb::capsule owner(values, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
                 self.kernels.gumbel(noise_key(seed, position), count, values->data());
                 return nb::ndarray<nb::numpy, float, nb::ndim<1>>(values->data(), {static_cast<size_t>(count)}, owner);
             },
             "seed"_a, "position"_a, "count"_a, "The noise of tokens 0..count-1 at a position: float32 [count].");

    nb::class_<SuffixLookup>(m, "SuffixLookup", "Longest suffix of a growing text that occurred in it before.")
        .def(nb::init<>())
        .def("extend", [](SuffixLookup& self, const Tokens& tokens) { self.extend(tokens); }, "tokens"_a)
        .def_prop_ro("match_length", &SuffixLookup::match_length)
        .def_prop_ro("match_end", &SuffixLookup::match_end)
        .def("continuation", [](const SuffixLookup& self, int64_t count) {
                 SuffixLookup::Continuation found = self.continuation(count);
                 return std::pair(std::move(found.tokens), std::move(found.sureness));
             },
             "count"_a, "What followed there: `count` tokens, and how sure each is, 0 to SURENESS_LEVELS - 1.")
        .def("__len__", &SuffixLookup::size);
}

}  // namespace gmtp
