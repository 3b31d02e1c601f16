#include "gmtp/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>

#include "gmtp/error.h"

namespace gmtp {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF values are read as the file stores them");

// No real file comes near these; they bound the time and memory that a hostile one can cost.
constexpr uint64_t kMaxKeys = 1 << 16, kMaxTensors = 1 << 20, kMaxNameBytes = 1 << 16, kMaxStrings = 1 << 24;
constexpr int64_t kMaxDims = 4;

struct TensorType {
    uint32_t id;
    const char* name;
    uint32_t block, bytes;  // values of a block, and its size in the file
};
constexpr TensorType kTensorTypes[] = {
    {0, "F32", 1, 4},        {1, "F16", 1, 2},        {2, "Q4_0", 32, 18},     {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},     {7, "Q5_1", 32, 24},     {8, "Q8_0", 32, 34},     {9, "Q8_1", 32, 40},
    {10, "Q2_K", 256, 84},   {11, "Q3_K", 256, 110},  {12, "Q4_K", 256, 144},  {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},  {15, "Q8_K", 256, 292},  {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50}, {20, "IQ4_NL", 32, 18},  {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},  {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},       {25, "I16", 1, 2},
    {26, "I32", 1, 4},       {27, "I64", 1, 8},       {28, "F64", 1, 8},       {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2},      {34, "TQ1_0", 256, 54},  {35, "TQ2_0", 256, 66},  {39, "MXFP4", 32, 17},
    {40, "NVFP4", 64, 36},   {41, "Q1_0", 128, 18},
};

[[noreturn]] void fail(const std::string& fault) { throw InputError(fault); }

// A name of the file as an error may show it: short, and without control characters or broken UTF-8.
std::string shown(std::string_view name) {
    std::string out = "'";
    for (char c : name.substr(0, 64)) out += c >= 0x20 && c < 0x7f ? c : '?';
    return out + (name.size() > 64 ? "...'" : "'");
}

// Whether the bytes are well-formed UTF-8 (RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF).
bool is_utf8(const uint8_t* s, size_t size) {
    for (size_t i = 0; i < size;) {
        const uint8_t lead = s[i];
        if (lead < 0x80) { i++; continue; }
        if (lead < 0xc2 || lead > 0xf4) return false;
        const size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
        if (length > size - i) return false;
        const uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
        const uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
        if (s[i + 1] < low || s[i + 1] > high) return false;
        for (size_t k = 2; k < length; k++)
            if ((s[i + k] & 0xc0) != 0x80) return false;
        i += length;
    }
    return true;
}

bool multiply(size_t a, size_t b, size_t& product) { return !__builtin_mul_overflow(a, b, &product); }

class Reader {
public:
    Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

    size_t at() const { return at_; }
    size_t left() const { return size_ - at_; }

    // Steps over `bytes` and returns where they start.
    size_t skip(size_t bytes, const char* part) {
        if (bytes > left()) fail(std::string("ends in the middle of its ") + part);
        size_t start = at_;
        at_ += bytes;
        return start;
    }
    template <class T> T value(const char* part) {
        T v;
        std::memcpy(&v, data_ + skip(sizeof(T), part), sizeof(T));
        return v;
    }
    std::string_view text(size_t max, const char* part) {
        uint64_t bytes = value<uint64_t>(part);
        if (bytes > max) fail("has a name of " + std::to_string(bytes) + " bytes in its " + part);
        const uint8_t* start = data_ + skip(bytes, part);
        if (!is_utf8(start, bytes)) fail(std::string("has a text in its ") + part + " that is not UTF-8");
        return {reinterpret_cast<const char*>(start), static_cast<size_t>(bytes)};
    }

private:
    const uint8_t* data_;
    size_t size_, at_ = 0;
};

std::string_view read_name(Reader& in, std::set<std::string_view>& seen, const char* what, const char* part) {
    std::string_view name = in.text(kMaxNameBytes, part);
    if (name.empty()) fail(std::string("has a ") + what + " without a name");
    if (!seen.insert(name).second) fail(std::string("has the ") + what + " " + shown(name) + " twice");
    return name;
}

void read_value(Reader& in, const uint8_t* data, GgufValue& v) {
    constexpr const char* part = "metadata";
    auto wrong = [&](const std::string& fault) { fail("has " + fault + " for the key " + shown(v.key)); };
    auto read_type = [&] {
        uint32_t t = in.value<uint32_t>(part);
        if (t > static_cast<uint32_t>(GgufType::F64)) wrong("a value of the unknown type " + std::to_string(t));
        return static_cast<GgufType>(t);
    };
    uint64_t count = 1;
    v.type = read_type();
    v.is_array = v.type == GgufType::Array;
    if (v.is_array) {
        v.type = read_type();
        if (v.type == GgufType::Array) wrong("an array of arrays");
        count = in.value<uint64_t>(part);
    }
    // An element takes at least 8 bytes (a string's length) or its own size, so a count beyond this is a lie.
    const size_t element = v.type == GgufType::String ? 8 : gguf_type_bytes(v.type);
    if (count > in.left() / element)
        fail("ends before the " + std::to_string(count) + " values of the key " + shown(v.key));
    v.count = count;
    if (v.type == GgufType::String) {
        if (count > kMaxStrings) wrong(std::to_string(count) + " texts");
        for (size_t i = 0; i < count; i++) {
            const std::string_view text = in.text(SIZE_MAX, part);
            v.starts.push_back(in.at() - text.size());
        }
        v.starts.push_back(in.at() + 8);
        v.offset = v.starts[0];
    } else {
        v.offset = in.skip(count * element, part);
        if (v.type == GgufType::Bool)
            for (size_t i = 0; i < count; i++)
                if (data[v.offset + i] > 1) wrong("a value that is neither true nor false");
    }
}

size_t read_alignment(const GgufIndex& index, const uint8_t* data) {
    for (const GgufValue& v : index.metadata) {
        if (v.key != "general.alignment") continue;
        if (v.type != GgufType::U32 || v.is_array) fail("has a general.alignment that is not a 32-bit number");
        uint32_t alignment;
        std::memcpy(&alignment, data + v.offset, sizeof(alignment));
        if (alignment < 8 || alignment > (1 << 20) || !std::has_single_bit(alignment))
            fail("has the general.alignment " + std::to_string(alignment) +
                 ", which is not a power of two from 8 to 1048576");
        return alignment;
    }
    return 32;
}

// The tensor's `offset` is left as in the file: relative to where the data starts.
void read_tensor(Reader& in, GgufTensor& t) {
    constexpr const char* part = "list of tensors";
    auto wrong = [&](const std::string& fault) { fail("gives the tensor " + shown(t.name) + " " + fault); };
    uint32_t dims = in.value<uint32_t>(part);
    if (dims < 1 || dims > kMaxDims) wrong(std::to_string(dims) + " dimensions instead of 1 to 4");
    size_t count = 1;
    for (uint32_t d = 0; d < dims; d++) {
        uint64_t length = in.value<uint64_t>(part);
        if (length == 0) wrong("a dimension of 0");
        if (length > INT64_MAX || !multiply(count, length, count)) wrong("a size that overflows");
        t.shape.insert(t.shape.begin(), static_cast<int64_t>(length));
    }
    uint32_t id = in.value<uint32_t>(part);
    const auto type = std::ranges::find(kTensorTypes, id, &TensorType::id);
    if (type == std::end(kTensorTypes)) wrong("the unknown type " + std::to_string(id));
    t.type = type->name;
    if (t.shape.back() % type->block)
        wrong("rows of " + std::to_string(t.shape.back()) + " values, which is no multiple of the " +
              std::to_string(type->block) + " that its type " + type->name + " needs");
    if (!multiply(count / type->block, type->bytes, t.bytes)) wrong("a size that overflows");
    t.offset = in.value<uint64_t>(part);
}

}  // namespace

size_t gguf_type_bytes(GgufType t) {
    switch (t) {
        case GgufType::U8: case GgufType::I8: case GgufType::Bool: return 1;
        case GgufType::U16: case GgufType::I16: return 2;
        case GgufType::U32: case GgufType::I32: case GgufType::F32: return 4;
        case GgufType::U64: case GgufType::I64: case GgufType::F64: return 8;
        case GgufType::String: case GgufType::Array: return 0;
    }
    return 0;
}

GgufIndex read_gguf(const uint8_t* data, size_t size) {
    constexpr const char* part = "header";
    Reader in(data, size);
    if (size < 4 || std::memcmp(data, "GGUF", 4) != 0) fail("does not start with the letters GGUF");
    in.skip(4, part);
    GgufIndex index{in.value<uint32_t>(part), 0, {}, {}};
    if (index.version != 0 && (index.version & 0xffff) == 0) fail("is a big-endian GGUF file, which is not supported");
    if (index.version != 2 && index.version != 3)
        fail("has GGUF version " + std::to_string(index.version) + ", but only 2 and 3 are supported");
    const uint64_t tensors = in.value<uint64_t>(part), keys = in.value<uint64_t>(part);
    if (keys > kMaxKeys) fail("claims to have " + std::to_string(keys) + " metadata keys");
    if (tensors > kMaxTensors) fail("claims to have " + std::to_string(tensors) + " tensors");

    std::set<std::string_view> seen;
    for (uint64_t i = 0; i < keys; i++) {
        GgufValue& v = index.metadata.emplace_back();
        v.key = read_name(in, seen, "key", "metadata");
        read_value(in, data, v);
    }
    index.alignment = read_alignment(index, data);

    seen.clear();
    for (uint64_t i = 0; i < tensors; i++) {
        GgufTensor& t = index.tensors.emplace_back();
        t.name = read_name(in, seen, "tensor", "list of tensors");
        read_tensor(in, t);
        if (t.offset % index.alignment)
            fail("puts the tensor " + shown(t.name) + " at the offset " + std::to_string(t.offset) +
                 ", which is no multiple of its alignment, " + std::to_string(index.alignment));
    }
    if (tensors == 0) return index;
    const size_t padding = (index.alignment - in.at() % index.alignment) % index.alignment;
    if (padding > in.left()) fail("ends before its tensors' data");
    const size_t start = in.at() + padding;
    for (GgufTensor& t : index.tensors) {
        if (t.offset > size - start || t.bytes > size - start - t.offset)
            fail("ends before the " + std::to_string(t.bytes) + " bytes of the tensor " + shown(t.name) +
                 ", as a partial download would");
        t.offset += start;
    }
    return index;
}

}  // namespace gmtp
