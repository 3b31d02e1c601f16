// A GGUF array of strings as a Python object: the strings stay in the file until asked for.
#pragma once
#include <nanobind/ndarray.h>

#include <string_view>
#include <utility>
#include <vector>

#include "bindings.h"
#include "gmtp/strings.h"

namespace gmtp {

using FileBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Keeps the file's mapping alive.
class StringArray {
public:
    StringArray(FileBytes file, std::vector<size_t> starts) : file_(std::move(file)), starts_(std::move(starts)) {}

    StringsView view() const { return {reinterpret_cast<const char*>(file_.data()), starts_}; }
    size_t size() const { return view().size(); }

private:
    FileBytes file_;
    std::vector<size_t> starts_;
};

}  // namespace gmtp
