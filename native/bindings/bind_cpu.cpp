#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "gmtp/cpu.h"

namespace gmtp {

void bind_cpu(nb::module_& m) {
    m.def("isas", &available_isas,
          "Names of the instruction-set builds this CPU can run, best first ('avx512', 'avx2', 'portable').");
}

}  // namespace gmtp
