// The index of a GGUF file as Python objects. Arrays stay in the file: numbers as an offset to view them at, strings
// behind StringArray.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>

#include "bindings.h"
#include "gmtp/error.h"
#include "gmtp/gguf.h"
#include "string_array.h"

namespace gmtp {
namespace {

nb::str text(std::string_view s) { return nb::str(s.data(), s.size()); }

// Strings of Python laid out as a file would have them.
void from_strings(StringArray* array, const std::vector<std::string>& strings) {
    std::vector<size_t> starts{8};
    for (const std::string& s : strings) starts.push_back(starts.back() + s.size() + 8);
    auto bytes = std::make_unique<uint8_t[]>(starts.back());
    for (size_t i = 0; i < strings.size(); i++) std::memcpy(&bytes[starts[i]], strings[i].data(), strings[i].size());
    nb::capsule owner(bytes.get(), [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    const size_t size = starts.back();
    new (array) StringArray(FileBytes(bytes.release(), {size}, owner), std::move(starts));
}

nb::str item(const StringArray& strings, int64_t i) {
    if (i < 0) i += static_cast<int64_t>(strings.size());
    if (i < 0 || i >= static_cast<int64_t>(strings.size())) throw nb::index_error("string index out of range");
    return text(strings.view()[static_cast<size_t>(i)]);
}

nb::list to_list(const StringArray& strings) {
    nb::list out;
    for (size_t i = 0; i < strings.size(); i++) out.append(text(strings.view()[i]));
    return out;
}

template <class T> T load(const uint8_t* at) {
    T v;
    std::memcpy(&v, at, sizeof(T));
    return v;
}

nb::object number(const uint8_t* at, GgufType type) {
    switch (type) {
        case GgufType::U8: return nb::int_(load<uint8_t>(at));
        case GgufType::I8: return nb::int_(load<int8_t>(at));
        case GgufType::U16: return nb::int_(load<uint16_t>(at));
        case GgufType::I16: return nb::int_(load<int16_t>(at));
        case GgufType::U32: return nb::int_(load<uint32_t>(at));
        case GgufType::I32: return nb::int_(load<int32_t>(at));
        case GgufType::U64: return nb::int_(load<uint64_t>(at));
        case GgufType::I64: return nb::int_(load<int64_t>(at));
        case GgufType::F32: return nb::float_(load<float>(at));
        case GgufType::F64: return nb::float_(load<double>(at));
        case GgufType::Bool: return nb::bool_(load<uint8_t>(at) != 0);
        case GgufType::String: case GgufType::Array: break;
    }
    throw InputError("has a value that is not a number where one is expected");
}

const char* numpy_type(GgufType type) {
    switch (type) {
        case GgufType::U8: return "<u1";
        case GgufType::I8: return "<i1";
        case GgufType::U16: return "<u2";
        case GgufType::I16: return "<i2";
        case GgufType::U32: return "<u4";
        case GgufType::I32: return "<i4";
        case GgufType::F32: return "<f4";
        case GgufType::Bool: return "?";
        case GgufType::U64: return "<u8";
        case GgufType::I64: return "<i8";
        case GgufType::F64: return "<f8";
        case GgufType::String: case GgufType::Array: break;
    }
    throw InputError("has a value that is not a number where one is expected");
}

nb::object value(const FileBytes& file, GgufValue& v) {
    if (v.type == GgufType::String) {
        if (v.is_array) return nb::cast(StringArray(file, std::move(v.starts)));
        return text({reinterpret_cast<const char*>(file.data()) + v.offset, v.starts[1] - 8 - v.offset});
    }
    if (v.is_array) return nb::make_tuple(numpy_type(v.type), v.count, v.offset);
    return number(file.data() + v.offset, v.type);
}

nb::tuple read(FileBytes file) {
    GgufIndex index = read_gguf(file.data(), file.size());
    nb::dict metadata, tensors;
    for (GgufValue& v : index.metadata) metadata[text(v.key)] = value(file, v);
    for (const GgufTensor& t : index.tensors) {
        nb::list shape;
        for (int64_t length : t.shape) shape.append(length);
        tensors[text(t.name)] = nb::make_tuple(t.type, nb::tuple(shape), t.offset, t.bytes);
    }
    return nb::make_tuple(metadata, tensors);
}

}  // namespace

void bind_gguf(nb::module_& m) {
    nb::class_<StringArray>(m, "StringArray", "A GGUF array of strings, left in the file until asked for.")
        .def("__init__", &from_strings, nb::arg("strings"))
        .def("__len__", &StringArray::size)
        .def("__getitem__", &item)
        .def("tolist", &to_list, "All strings as a list of str.");
    m.def("read_gguf", &read, nb::arg("file"),
          "The metadata and tensors of a GGUF file in memory (uint8 [size]). Metadata: str, int, float, bool,\n"
          "StringArray, or (dtype, count, offset) for an array of numbers. Tensors: (type, shape, offset, bytes).\n"
          "Raises InputError with the fault as the rest of a sentence that starts with the file's name.");
}

}  // namespace gmtp
