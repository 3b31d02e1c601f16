// Reads the index of a GGUF file (version 2 or 3, little-endian) that lies in memory: its metadata and where each
// tensor is. Nothing of the file is trusted: whatever this returns lies inside the memory given, and texts are UTF-8.
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gmtp {

enum class GgufType : uint32_t {
    U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64
};

// Bytes of a value of a fixed size; 0 for strings and arrays.
size_t gguf_type_bytes(GgufType t);

struct GgufValue {
    std::string_view key;
    GgufType type;                   // of the value, or of an array's elements
    bool is_array;
    size_t count;                    // elements: 1 unless an array
    size_t offset;                   // where the first element's bytes start: for a string its text
    std::vector<size_t> starts;      // strings: where each text starts; text i ends at starts[i + 1] - 8, also the last
};

struct GgufTensor {
    std::string_view name;
    std::string_view type;           // such as "Q4_K"
    std::vector<int64_t> shape;      // outputs first: the reverse of the file's order
    size_t offset, bytes;            // in the file
};

struct GgufIndex {
    uint32_t version;
    size_t alignment;                // of the tensors' data
    std::vector<GgufValue> metadata;
    std::vector<GgufTensor> tensors;
};

// The views of the result point into `data`, which must outlive it. Throws InputError with the fault as the rest of a
// sentence that starts with the file's name ("ends in the middle of its metadata").
GgufIndex read_gguf(const uint8_t* data, size_t size);

}  // namespace gmtp
