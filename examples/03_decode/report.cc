#include "examples/03_decode/report.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/text/text_tensors.h"
#include "nsa/config.h"
#include "nsa/stats.h"

namespace nsa::examples {
namespace {

// Right ones, and all.
std::pair<int, int> CountAnswers(const std::vector<Conversation>& conversations) {
  int num_right = 0, num_all = 0;
  for (const Conversation& conversation : conversations) {
    for (size_t i = 0; i < conversation.answers().size(); ++i) {
      num_right += conversation.answers()[i] == conversation.riddles()[i].answer;
      ++num_all;
    }
  }
  return {num_right, num_all};
}

double Percentile(std::vector<double> values, double percent) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(percent / 100 * static_cast<double>(values.size() - 1))];
}

}  // namespace

std::string AnswersReport(const std::vector<Conversation>& conversations) {
  std::string text;
  for (size_t s = 0; s < conversations.size(); ++s) {
    absl::StrAppend(&text, "sequence ", s, ":");
    for (size_t i = 0; i < conversations[s].answers().size(); ++i) {
      const std::string& answer = conversations[s].answers()[i];
      const std::string& truth = conversations[s].riddles()[i].answer;
      absl::StrAppend(&text, "  ", answer,
                      answer == truth ? " right" : absl::StrCat(" wrong, it is ", truth));
    }
    text += "\n";
  }
  const auto [num_right, num_all] = CountAnswers(conversations);
  return absl::StrCat(text, num_right, " of ", num_all, " answers are right\n");
}

std::string SpeedReport(const Decoding& decoding, int64_t num_sequences,
                        const ServiceStats& stats) {
  const NsaConfig config = DemoConfig();
  const std::vector<double>& seconds = decoding.step_seconds;
  // Of a step, in tokens of one sequence, whose cache grows as it goes.
  const int64_t cached = decoding.cached_tokens + static_cast<int64_t>(seconds.size()) / 2;
  const int64_t blocks =
      std::min(cached, int64_t{config.num_selected_blocks} * config.select_block_tokens);
  const int64_t window = std::min<int64_t>(cached, config.window_tokens);
  const int64_t summaries = NumCompressionBlocks(config, cached);
  const double token_bytes =
      2.0 * config.num_kv_heads * (config.head_dim_qk + config.head_dim_v) * num_sequences;
  const double read = token_bytes * static_cast<double>(blocks + window + summaries);
  const double dense = token_bytes * static_cast<double>(cached);
  return absl::StrFormat(
      "%d steps of %d sequences: %.0f tokens a second; a step takes the service %.2f ms "
      "(median), %.2f (90%%), %.2f (99%%)\n"
      "read in a step: %s, the keys and values of %d selected, %d window and %d summary tokens a "
      "sequence;\n"
      "the dense cache: %s, %.1f times as much; %s\n",
      seconds.size(), num_sequences,
      static_cast<double>(num_sequences) * static_cast<double>(seconds.size()) / decoding.seconds,
      1e3 * Percentile(seconds, 50), 1e3 * Percentile(seconds, 90), 1e3 * Percentile(seconds, 99),
      FormatBytes(read), blocks, window, summaries, FormatBytes(dense), dense / read,
      stats.bytes_fetched() == 0
          ? "pages of other ranks are read in place"
          : absl::StrCat("fetched from other ranks in all: ",
                         FormatBytes(static_cast<double>(stats.bytes_fetched()))));
}

absl::Status CheckAnswers(const std::vector<Conversation>& conversations) {
  const auto [num_right, num_all] = CountAnswers(conversations);
  if (num_right == num_all) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat(num_all - num_right, " answers are wrong"));
}

}  // namespace nsa::examples
