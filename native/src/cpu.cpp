#include "gmtp/cpu.h"

namespace gmtp {

std::vector<std::string> available_isas() {
    std::vector<std::string> found;
#if defined(GMTP_HAVE_avx512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        found.push_back("avx512");
#endif
#if defined(GMTP_HAVE_avx2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back("avx2");
#endif
    found.push_back("portable");
    return found;
}

}  // namespace gmtp
