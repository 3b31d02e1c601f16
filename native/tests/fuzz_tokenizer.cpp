// Fuzzes the byte-pair encoder: with any vocabulary, any bytes become tokens that spell the same bytes.
//
// With Clang's libFuzzer (-DGMTP_FUZZ=ON) this searches for inputs; without it main() makes them up itself, the same ones
// in every run, so that any compiler's sanitizers can watch.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "gmtp/error.h"
#include "gmtp/tokenizer.h"

namespace {

struct Strings {
    std::string bytes = std::string(8, 0);
    std::vector<size_t> starts{8};
    void push(std::string_view s) {
        bytes += s;
        bytes.append(8, 0);
        starts.push_back(bytes.size());
    }
    gmtp::StringsView view() const { return {bytes.data(), starts}; }
};

std::string respelled(std::string_view text) {
    std::string out;
    for (char c : text) out += c == ' ' ? "\xE2\x96\x81" : std::string(1, c);
    return out;
}

// What the tokens spell, byte tokens as their byte. They are the first 256.
std::string spelled(const gmtp::BytePairEncoder& encoder, const std::vector<int32_t>& ids) {
    std::string out;
    for (int32_t id : ids) {
        if (id < 256) out += static_cast<char>(id);
        else out += encoder.token(static_cast<size_t>(id));
    }
    return out;
}

}  // namespace

// Lines that start with a digit are tokens of that kind, those with an 'm' merges, the rest is the text.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Strings tokens, merges;
    std::vector<int32_t> kinds(256, static_cast<int32_t>(gmtp::TokenKind::Byte));
    for (int byte = 0; byte < 256; byte++) {
        char spelling[8];
        std::snprintf(spelling, sizeof spelling, "<0x%02X>", static_cast<unsigned>(byte));
        tokens.push(spelling);
    }
    std::string_view text{reinterpret_cast<const char*>(data), size};
    while (!text.empty() && ((text[0] >= '0' && text[0] <= '5') || text[0] == 'm')) {
        const std::string_view line = text.substr(1, text.find('\n') - 1);
        if (text[0] == 'm') {
            merges.push(line);
        } else {
            tokens.push(line);
            kinds.push_back(text[0] - '0');
        }
        text.remove_prefix(std::min(text.size(), line.size() + 2));
    }
    const gmtp::BytePairEncoder encoder(tokens.view(), kinds, merges.view());
    for (bool parse_control : {false, true}) {
        const std::vector<int32_t> ids = encoder.encode(text, parse_control);
        if (respelled(spelled(encoder, ids)) != respelled(text)) {
            std::fprintf(stderr, "The tokens do not spell the text.\n");
            std::abort();
        }
        for (int32_t id : ids) {
            if (!parse_control && kinds[static_cast<size_t>(id)] == static_cast<int32_t>(gmtp::TokenKind::Control)) {
                std::fprintf(stderr, "A control token came of a text that must not have any.\n");
                std::abort();
            }
        }
    }
    return 0;
}

#ifndef GMTP_LIBFUZZER
int main() {
    constexpr int kRuns = 20000;
    constexpr std::string_view kPieces[] = {"a", "b", "ab", "aa", " ", "  ", "<", "<|", "\xE2\x96\x81", "\xC3\xA9",
                                            "\xF0\x9F", "\xFF", "\xE2", "", "abc", std::string_view("\0", 1)};
    std::mt19937 random(1);
    auto word = [&](unsigned longest) {
        std::string out;
        for (unsigned n = random() % longest; n > 0; n--) out += kPieces[random() % std::size(kPieces)];
        return out;
    };
    for (int run = 0; run < kRuns; run++) {
        std::string input;
        for (unsigned n = random() % 24; n > 0; n--) input += std::to_string(random() % 6) + word(5) + "\n";
        for (unsigned n = random() % 8; n > 0; n--) input += "m" + word(4) + " " + word(4) + "\n";
        input += word(40);
        LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
    }
    std::printf("%d texts encoded\n", kRuns);
}
#endif
