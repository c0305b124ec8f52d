#include "examples/03_decode/conversation.h"

#include <cstdint>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "examples/text/text_tensors.h"

namespace nsa::examples {

absl::Status Conversation::Prepare() {
  const Riddle& riddle = riddles_[riddle_];
  const bool asks = place_ < riddle.question.size();
  text_ += asks ? riddle.question[place_] : retrieved_;
  if (!asks) answers_[riddle_] += retrieved_;
  if (++place_ == riddle.question.size() + riddle.answer.size()) {
    place_ = 0;
    riddle_ = (riddle_ + 1) % riddles_.size();
  }

  const NsaConfig config = DemoConfig();
  const TextTensors token(config, text_, {static_cast<int64_t>(text_.size()) - 1});
  if (token_ != nullptr) return token_->Update(token.inputs(), *kernels_);
  auto made = DeviceTensors::Create(token.inputs(), config, *kernels_);
  if (!made.ok()) return made.status();
  token_ = std::make_unique<DeviceTensors>(*std::move(made));
  return absl::OkStatus();
}

absl::Status Conversation::Submit(Client& client) const {
  const ForwardInputs& in = token_->inputs();
  const DecodeRequest request = {
      .sequence = sequence_,
      .inputs = {.q = in.q,
                 .kv = {in.k_cmp, in.k_slc, in.k_win, in.v_cmp, in.v_slc, in.v_win},
                 .gate = in.gate},
      .o = token_->outputs().o};
  return client.Submit(request).status();
}

absl::Status Conversation::Read() {
  std::vector<uint16_t> o(ORowBytes(DemoConfig()) / sizeof(uint16_t));
  absl::Status status = kernels_->CopyToHost(
      o.data(), token_->outputs().o.data, static_cast<int64_t>(o.size() * sizeof(o[0])), nullptr);
  status.Update(kernels_->Synchronize(nullptr));
  retrieved_ = RetrievedByte(DemoConfig(), o.data(), /*row=*/0);
  return status;
}

absl::StatusOr<double> Step(absl::Span<Conversation> conversations, Client& client) {
  for (Conversation& conversation : conversations) {
    if (absl::Status status = conversation.Prepare(); !status.ok()) return status;
  }
  const absl::Time begin = absl::Now();
  absl::Status status;
  size_t num_submitted = 0;
  for (const Conversation& conversation : conversations) {
    status = conversation.Submit(client);
    if (!status.ok()) break;
    ++num_submitted;
  }
  // Of all, also after an error: until a result is there, the service uses the request's tensors.
  for (; num_submitted > 0; --num_submitted) {
    const auto result = client.Next(absl::InfiniteFuture());
    status.Update(result.ok() ? result->status : result.status());
  }
  if (!status.ok()) return status;
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  for (Conversation& conversation : conversations) {
    if (absl::Status status = conversation.Read(); !status.ok()) return status;
  }
  return seconds;
}

}  // namespace nsa::examples
