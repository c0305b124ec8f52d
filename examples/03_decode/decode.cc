// A long text becomes a cache that lies on all ranks; sequences forked from it are asked for codes
// that are hidden in the text, and decode the answers through the service.
//
//   mpirun -n 4 decode [--device cpu|cuda] [--tokens N] [--text FILE] [--sequences N] [--decode N]
#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/types/span.h"
#include "examples/03_decode/conversation.h"
#include "examples/03_decode/quiz.h"
#include "examples/03_decode/report.h"
#include "examples/text/device_tensors.h"
#include "examples/text/text_tensors.h"
#include "nsa/engine.h"
#include "nsa/service.h"
#include "tools/launch/flags.h"
#include "tools/launch/launch.h"

ABSL_FLAG(int64_t, tokens, 65536, "tokens of the text, one a byte");
ABSL_FLAG(std::string, text, "", "text file; default: this system's license texts");
ABSL_FLAG(int32_t, sequences, 8, "sequences that are forked from the text");
ABSL_FLAG(int64_t, decode, 256, "tokens that each sequence decodes");

namespace nsa::examples {
namespace {

constexpr int kHome = 0;  // the rank whose sequences these are
constexpr absl::Time kNever = absl::InfiniteFuture();

ServiceOptions MakeOptions(const tools::RankContext& context) {
  ServiceOptions options;
  serving::KvCacheOptions& cache = options.cache;
  const int32_t num_sequences = absl::GetFlag(FLAGS_sequences) + 1;  // the text's own, too
  const int64_t decoded = absl::GetFlag(FLAGS_decode);
  cache.config = DemoConfig();
  cache.shares_kv = false;  // finders and readers have different keys
  cache.max_sequences = num_sequences;
  cache.max_tokens = absl::GetFlag(FLAGS_tokens) + decoded;
  cache.max_step_rows = num_sequences;
  cache.home_shares.assign(context.communicator->size(), 0.0);
  cache.home_shares[kHome] = 1.0;
  // A rank keeps its part of the text; the home, what comes then, and the window of each sequence.
  const int64_t block = cache.config.select_block_tokens;
  cache.num_pages = absl::GetFlag(FLAGS_tokens) / block / context.communicator->size() + 8;
  if (context.communicator->rank() == kHome) {
    cache.num_pages += num_sequences * ((decoded + cache.config.window_tokens) / block + 16);
  }
  return options;
}

// Collective: the forward over the text, whose keys and values become the tokens of `sequence`.
absl::Status Prefill(const tools::RankContext& context, const Quiz& quiz, Engine& engine,
                     serving::SequenceId sequence, Client& client) {
  const TextTensors text(DemoConfig(), quiz.text,
                         TokensOfRank(engine.shard_plan(), context.communicator->rank()));
  auto tensors = DeviceTensors::Create(text.inputs(), DemoConfig(), *context.kernels);
  if (!tensors.ok()) return tensors.status();
  return client.RunCollective([&](serving::KvCache& cache) {
    absl::Status status = engine.Forward(tensors->inputs(), tensors->outputs());
    if (!status.ok()) return status;
    return cache.AppendForward(kHome, sequence, engine, tensors->inputs(), /*document=*/0);
  });
}

// At home; elsewhere none.
absl::StatusOr<std::vector<Conversation>> Fork(const Quiz& quiz, serving::SequenceId sequence,
                                               const tools::RankContext& context, Client& client) {
  const bool is_home = context.communicator->rank() == kHome;
  const int64_t num_sequences = is_home ? absl::GetFlag(FLAGS_sequences) : 0;
  std::vector<Conversation> conversations;
  for (int64_t s = 0; s < num_sequences; ++s) {
    ControlRequest fork;
    fork.mutable_fork()->set_sequence(sequence);
    const auto forked = client.Control(fork, kNever);
    if (!forked.ok()) return forked.status();
    std::vector<Riddle> riddles;
    const auto& all = quiz.riddles;
    for (size_t i = s; i < all.size(); i += num_sequences) riddles.push_back(all[i]);
    conversations.emplace_back(forked->sequence(), quiz.text, std::move(riddles), context.kernels);
  }
  return conversations;
}

absl::Status RunDecode(const tools::RankContext& context) {
  comm::Communicator& communicator = *context.communicator;
  const int64_t num_tokens = absl::GetFlag(FLAGS_tokens);
  const int64_t num_steps = absl::GetFlag(FLAGS_decode);
  const int64_t num_riddles = absl::GetFlag(FLAGS_sequences) * (num_steps / RiddleTokens());
  auto quiz = MakeQuiz(absl::GetFlag(FLAGS_text), num_tokens, num_riddles);
  if (!quiz.ok()) return quiz.status();
  auto plan = ShardPlan::Parse("zigzag", num_tokens, communicator.size());
  if (!plan.ok()) return plan.status();
  auto engine =
      Engine::Create({.config = DemoConfig()}, *plan, context.communicator, context.kernels);
  if (!engine.ok()) return engine.status();
  auto service = Service::Create(MakeOptions(context), context.communicator, context.kernels);
  if (!service.ok()) return service.status();
  auto client = (*service)->Connect();
  if (!client.ok()) return client.status();

  const absl::Time begin = absl::Now();
  ControlRequest open;
  open.mutable_open();
  const auto opened = (*client)->Control(open, kNever);
  if (!opened.ok()) return opened.status();
  absl::Status status = Prefill(context, *quiz, **engine, opened->sequence(), **client);
  if (!status.ok()) return status;
  if (communicator.rank() == kHome) {
    std::cout << absl::StrFormat("%d tokens of text on %d ranks, each on %s: prefilled in %.3f s\n",
                                 num_tokens, communicator.size(), context.device_name,
                                 absl::ToDoubleSeconds(absl::Now() - begin));
  }
  auto conversations = Fork(*quiz, opened->sequence(), context, **client);
  if (!conversations.ok()) return conversations.status();
  Decoding decoding = {.cached_tokens = num_tokens};
  const absl::Time decode_begin = absl::Now();
  for (int64_t i = 1; i <= num_steps && status.ok(); ++i) {
    const auto seconds = Step(absl::MakeSpan(*conversations), **client);
    if (!seconds.ok()) return seconds.status();
    decoding.step_seconds.push_back(*seconds);
    // The others' memory is read until the end, for which they wait some steps at a time.
    if (i % 64 != 0 && i < num_steps) continue;
    status = (*client)->RunCollective([&](serving::KvCache&) { return communicator.Barrier(); });
  }
  if (!status.ok() || communicator.rank() != kHome) return status;
  decoding.seconds = absl::ToDoubleSeconds(absl::Now() - decode_begin);
  std::cout << AnswersReport(*conversations)
            << SpeedReport(decoding, absl::GetFlag(FLAGS_sequences), (*service)->Stats());
  return CheckAnswers(*conversations);
}

}  // namespace
}  // namespace nsa::examples

int main(int argc, char** argv) {
  absl::Status status = nsa::tools::ParseFlags(
      "Decodes retrieval queries on a long text that lies on several ranks.", argc, argv);
  auto options = nsa::tools::LaunchOptionsFromFlags();
  status.Update(options.status());
  if (status.ok()) status = nsa::tools::RunRanks(*options, std::getenv, nsa::examples::RunDecode);
  if (status.ok()) return 0;
  std::cerr << "decode: " << status << "\n";
  return 1;
}
