// A sequence that is asked riddles, one token at a time, and answers them by itself.
#ifndef EXAMPLES_03_DECODE_CONVERSATION_H_
#define EXAMPLES_03_DECODE_CONVERSATION_H_

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "examples/03_decode/quiz.h"
#include "examples/text/device_tensors.h"
#include "kernels/kernels.h"
#include "nsa/config.h"
#include "nsa/service.h"

namespace nsa::examples {

class Conversation {
 public:
  // `sequence` holds `text`.
  Conversation(serving::SequenceId sequence, std::string text, std::vector<Riddle> riddles,
               std::shared_ptr<kernels::Kernels> kernels)
      : sequence_(sequence),
        text_(std::move(text)),
        riddles_(std::move(riddles)),
        answers_(riddles_.size()),
        kernels_(std::move(kernels)) {}

  // Makes the next token: of the question, or what was retrieved, which is the answer's.
  absl::Status Prepare();
  absl::Status Submit(Client& client) const;
  // Once its result is there: sees what the token retrieved.
  absl::Status Read();

  // What was answered to each riddle so far.
  const std::vector<std::string>& answers() const { return answers_; }
  const std::vector<Riddle>& riddles() const { return riddles_; }

 private:
  const serving::SequenceId sequence_;
  std::string text_;
  const std::vector<Riddle> riddles_;
  std::vector<std::string> answers_;
  const std::shared_ptr<kernels::Kernels> kernels_;
  std::unique_ptr<DeviceTensors> token_;
  size_t riddle_ = 0;
  size_t place_ = 0;  // in question and answer
  char retrieved_ = 0;
};

// A token of each, of which the client has no other requests. How long the service took, in
// seconds.
absl::StatusOr<double> Step(absl::Span<Conversation> conversations, Client& client);

}  // namespace nsa::examples

#endif  // EXAMPLES_03_DECODE_CONVERSATION_H_
