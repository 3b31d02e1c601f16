// Strings as a GGUF file lays out an array of them: each after its length, a number of 8 bytes.
#pragma once
#include <cstddef>
#include <span>
#include <string_view>

namespace gmtp {

struct StringsView {
    const char* base = nullptr;
    std::span<const size_t> starts;  // where each text starts; text i ends at starts[i + 1] - 8, also the last

    size_t size() const { return starts.empty() ? 0 : starts.size() - 1; }
    std::string_view operator[](size_t i) const { return {base + starts[i], starts[i + 1] - 8 - starts[i]}; }
};

}  // namespace gmtp
