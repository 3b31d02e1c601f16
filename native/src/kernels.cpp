#include "gmtp/kernels.h"

#include <algorithm>
#include <string>

#include "gmtp/cpu.h"
#include "gmtp/error.h"

namespace gmtp {

#define GMTP_DECLARE(isa)                             \
    namespace isa {                                   \
    extern const MatmulKernels matmul_kernels;        \
    extern const LayerKernels layer_kernels;          \
    extern const SamplingKernels sampling_kernels;    \
    }
#define GMTP_TABLE(isa) Kernels{#isa, &isa::matmul_kernels, &isa::layer_kernels, &isa::sampling_kernels}

GMTP_DECLARE(portable)
#if defined(GMTP_HAVE_avx2)
GMTP_DECLARE(avx2)
#endif
#if defined(GMTP_HAVE_avx512)
GMTP_DECLARE(avx512)
#endif

namespace {

const Kernels kTables[] = {
#if defined(GMTP_HAVE_avx512)
    GMTP_TABLE(avx512),
#endif
#if defined(GMTP_HAVE_avx2)
    GMTP_TABLE(avx2),
#endif
    GMTP_TABLE(portable),
};

}  // namespace

const Kernels& kernels_for(std::string_view isa) {
    const auto available = available_isas();
    if (isa == "auto") isa = available.front();
    std::string names;
    for (const auto& name : available) {
        if (name == isa)
            return *std::find_if(std::begin(kTables), std::end(kTables), [&](const Kernels& k) { return k.isa == isa; });
        names += ", " + name;
    }
    throw InputError("This CPU has no instruction-set build '" + std::string(isa) + "': choose one of auto" + names + ".");
}

}  // namespace gmtp
