// The lines of JSON that the benchmarks of whole calls print, and the flags of the shape, which all
// of them have: --q_heads, --kv_heads, --dim_qk, --dim_v.
#ifndef BENCHMARKS_RESULT_LINES_H_
#define BENCHMARKS_RESULT_LINES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "benchmarks/gpu_rank.h"
#include "nlohmann/json.hpp"
#include "nsa/config.h"

namespace nsa::benchmarks {

using Json = nlohmann::ordered_json;

// Of the flags; else the defaults.
NsaConfig ConfigOfFlags();

// What a line begins with: what ran, where and with which heads.
absl::StatusOr<Json> Heading(absl::string_view pass, const GpuRank& gpu, const NsaConfig& config);

// To four decimals.
double Rounded(double value);

// Of rank 0 alone.
void Print(const GpuRank& gpu, const Json& line);

// Whole numbers of at least 1; InvalidArgument names the flag.
absl::StatusOr<std::vector<int64_t>> NumbersOf(absl::string_view flag,
                                               const std::vector<std::string>& values);

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_RESULT_LINES_H_
