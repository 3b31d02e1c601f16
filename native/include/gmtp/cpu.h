// Which of the compiled instruction-set builds this CPU can run.
#pragma once
#include <string>
#include <vector>

namespace gmtp {
std::vector<std::string> available_isas();
}  // namespace gmtp
