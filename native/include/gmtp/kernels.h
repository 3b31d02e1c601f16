// The kernels of one instruction-set build. Each kernels/*.cpp defines a table per build; src/kernels.cpp picks one set.
#pragma once
#include <string_view>

#include "gmtp/layers.h"
#include "gmtp/matrix.h"
#include "gmtp/sampler.h"

namespace gmtp {

struct Kernels {
    const char* isa;
    const MatmulKernels* matmul;
    const LayerKernels* layer;
    const SamplingKernels* sampling;
};

// The set for an instruction-set build by name, or the best this CPU runs for "auto". Throws InputError on another name.
const Kernels& kernels_for(std::string_view isa);

}  // namespace gmtp
