// What came of it, for people.
#ifndef EXAMPLES_03_DECODE_REPORT_H_
#define EXAMPLES_03_DECODE_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "examples/03_decode/conversation.h"
#include "nsa/service.pb.h"

namespace nsa::examples {

struct Decoding {
  int64_t cached_tokens = 0;              // of each sequence, before
  double seconds = 0;                     // in all
  std::vector<double> step_seconds = {};  // of the service, each
};

// Questions and what was retrieved.
std::string AnswersReport(const std::vector<Conversation>& conversations);
// Tokens a second, latencies, bytes.
std::string SpeedReport(const Decoding& decoding, int64_t num_sequences, const ServiceStats& stats);
// NotFound when an answer is wrong.
absl::Status CheckAnswers(const std::vector<Conversation>& conversations);

}  // namespace nsa::examples

#endif  // EXAMPLES_03_DECODE_REPORT_H_
