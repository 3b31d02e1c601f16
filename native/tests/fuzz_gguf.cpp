// Fuzzes the GGUF parser: any bytes give an index that lies inside them, or an InputError.
//
// With Clang's libFuzzer (-DGMTP_FUZZ=ON) this searches for inputs; without it main() replays the files it is given, so
// that a corpus can be checked under any compiler's sanitizers.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

#include "gmtp/error.h"
#include "gmtp/gguf.h"

namespace {

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        const gmtp::GgufIndex index = gmtp::read_gguf(data, size);
        unsigned sum = 0;
        auto read = [&](size_t begin, size_t bytes) {
            require(begin <= size && bytes <= size - begin, "A part of the index lies outside the file.");
            for (size_t i = begin; i < begin + bytes; i++) sum += data[i];
        };
        for (const gmtp::GgufValue& v : index.metadata) {
            if (v.type != gmtp::GgufType::String) {
                read(v.offset, v.count * gmtp::gguf_type_bytes(v.type));
                continue;
            }
            require(v.starts.size() == v.count + 1, "A string array has another number of starts than of strings.");
            for (size_t i = 0; i < v.count; i++) read(v.starts[i], v.starts[i + 1] - 8 - v.starts[i]);
        }
        for (const gmtp::GgufTensor& t : index.tensors) {
            require(!t.name.empty() && t.shape.size() >= 1 && t.shape.size() <= 4, "A tensor has no name or shape.");
            read(t.offset, t.bytes);
        }
        // The sum goes to a place the compiler cannot see through, so that the reads above are not dropped.
        volatile unsigned keep = sum;
        (void)keep;
    } catch (const gmtp::InputError&) {
    }
    return 0;
}

#ifndef GMTP_LIBFUZZER
int main(int count, char** files) {
    for (int i = 1; i < count; i++) {
        std::ifstream file(files[i], std::ios::binary);
        require(file.good(), "A file to replay cannot be opened.");
        const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
        // A block of exactly this size, so that AddressSanitizer sees a read one byte past its end.
        const auto block = std::make_unique<uint8_t[]>(bytes.size());
        std::copy(bytes.begin(), bytes.end(), block.get());
        LLVMFuzzerTestOneInput(block.get(), bytes.size());
    }
    std::printf("%d files replayed\n", count - 1);
}
#endif
