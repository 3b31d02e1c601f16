// A fault in what the user gave us: the Python side shows its message as one sentence.
#pragma once
#include <stdexcept>
#include <string>

namespace gmtp {
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
}  // namespace gmtp
