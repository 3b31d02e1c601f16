// The byte-pair encoder over a checkpoint's own vocabulary.
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <new>

#include "bindings.h"
#include "gmtp/tokenizer.h"
#include "string_array.h"

namespace gmtp {
namespace {

using Kinds = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void build(BytePairEncoder* encoder, const StringArray& tokens, Kinds kinds, const StringArray& merges) {
    const std::span<const int32_t> kind_values{kinds.data(), kinds.size()};
    nb::gil_scoped_release release;
    new (encoder) BytePairEncoder(tokens.view(), kind_values, merges.view());
}

std::vector<int32_t> encode(const BytePairEncoder& encoder, nb::bytes text, bool parse_control) {
    const std::string_view utf8{text.c_str(), text.size()};
    nb::gil_scoped_release release;
    return encoder.encode(utf8, parse_control);
}

nb::bytes token(const BytePairEncoder& encoder, int64_t id) {
    if (id < 0 || id >= static_cast<int64_t>(encoder.size())) throw nb::index_error("token id out of range");
    const std::string_view spelling = encoder.token(static_cast<size_t>(id));
    return nb::bytes(spelling.data(), spelling.size());
}

}  // namespace

void bind_tokenizer(nb::module_& m) {
    nb::class_<BytePairEncoder>(m, "BytePairEncoder", "Byte-pair encoding with a SentencePiece-style vocabulary.")
        .def("__init__", &build, nb::arg("tokens"), nb::arg("kinds"), nb::arg("merges"), nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 4>(),
             "kinds: int32 [tokens] as in tokenizer.ggml.token_type. merges: 'left right', best first; none: the order of\n"
             "ids. Raises InputError.")
        .def("encode", &encode, nb::arg("text"), nb::arg("parse_control"), "Token ids of a UTF-8 text.")
        .def("token", &token, nb::arg("id"), "A token as the file spells it, in UTF-8: a byte token as '<0x0A>'.")
        .def("__len__", &BytePairEncoder::size);
}

}  // namespace gmtp
