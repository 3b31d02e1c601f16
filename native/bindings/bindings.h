// One registration function per subsystem; module.cpp calls them all.
#pragma once
#include <nanobind/nanobind.h>

#include <string>
#include <utility>
#include <vector>

#include "gmtp/matrix.h"
#include "gmtp/sampler.h"

namespace gmtp {
namespace nb = nanobind;

// Weight types by the names GGUF gives them. Throws InputError on another name.
WeightType weight_type(const std::string& name);
const char* weight_type_name(WeightType type);

using Biases = std::vector<std::pair<int32_t, float>>;
inline std::vector<LogitBias> native_biases(const Biases& given) {
    std::vector<LogitBias> biases;
    for (auto [token, value] : given) biases.push_back({token, value});
    return biases;
}

void bind_cpu(nb::module_& m);
void bind_gguf(nb::module_& m);
void bind_matrix(nb::module_& m);
void bind_plan(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_tokenizer(nb::module_& m);
}  // namespace gmtp
