// The extension module gemma_mtp._native: each subsystem registers its own part.
#include "bindings.h"
#include "gmtp/error.h"

NB_MODULE(_native, m) {
    m.doc() = "Native kernels and executor of gemma-mtp.";
    gmtp::nb::exception<gmtp::InputError>(m, "InputError", PyExc_RuntimeError);
    gmtp::bind_cpu(m);
    gmtp::bind_gguf(m);
    gmtp::bind_matrix(m);
    gmtp::bind_plan(m);
    gmtp::bind_sampler(m);
    gmtp::bind_tokenizer(m);
}
