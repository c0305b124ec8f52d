#include "nsa/serving/metrics.h"

#include <cstdint>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"

namespace nsa::serving {
namespace {

// More digits than absl::StrCat has: a sum of weeks must still show a step.
std::string Number(double value) { return absl::StrFormat("%.15g", value); }

class Page {
 public:
  // The samples of a metric follow its head.
  void Head(absl::string_view name, absl::string_view type, absl::string_view help) {
    name_ = absl::StrCat("nsa_", name);
    absl::StrAppend(&text_, "# HELP ", name_, " ", help, "\n# TYPE ", name_, " ", type, "\n");
  }
  void Sample(const absl::AlphaNum& value, absl::string_view labels = "",
              absl::string_view suffix = "") {
    absl::StrAppend(&text_, name_, suffix);
    if (!labels.empty()) absl::StrAppend(&text_, "{", labels, "}");
    absl::StrAppend(&text_, " ", value, "\n");
  }
  void Gauge(absl::string_view name, absl::string_view help, int64_t value) {
    Head(name, "gauge", help);
    Sample(value);
  }
  void Counter(absl::string_view name, absl::string_view help, int64_t value) {
    Head(name, "counter", help);
    Sample(value);
  }

  const std::string& text() const { return text_; }

 private:
  std::string name_;
  std::string text_;
};

}  // namespace

std::string FormatMetrics(const ServiceStats& stats) {
  Page page;
  page.Head("health", "gauge", "1 for the state that the service is in.");
  for (int state = 0; state < ServiceHealth::State_ARRAYSIZE; ++state) {
    page.Sample(
        int{stats.health().state() == state},
        absl::StrCat("state=\"",
                     ServiceHealth::State_Name(static_cast<ServiceHealth::State>(state)), "\""));
  }
  page.Gauge("clients", "Clients that are connected.", stats.clients());
  page.Gauge("queue_depth", "Requests that have not begun.", stats.queue_depth());
  page.Head("requests_total", "counter", "Requests that have ended, by status code.");
  for (const auto& [code, count] : std::map<std::string, int64_t>(stats.requests_by_code().begin(),
                                                                  stats.requests_by_code().end())) {
    page.Sample(count, absl::StrCat("code=\"", code, "\""));
  }

  page.Gauge("sequences", "Sequences of this rank.", stats.sequences());
  page.Gauge("pages", "Pages that this rank's sequences may take, on all ranks.", stats.pages());
  page.Gauge("pages_used", "Pages that this rank's sequences have, on all ranks.",
             stats.pages_used());
  page.Head("pages_used_of_rank", "gauge", "Pages that this rank's sequences have on a rank.");
  for (int rank = 0; rank < stats.pages_used_of_rank_size(); ++rank) {
    page.Sample(stats.pages_used_of_rank(rank), absl::StrCat("rank=\"", rank, "\""));
  }
  page.Gauge("summary_pages", "Pages for summaries.", stats.summary_pages());
  page.Gauge("summary_pages_used", "Pages with summaries.", stats.summary_pages_used());
  page.Counter("appended_tokens_total", "Tokens appended to sequences.", stats.tokens_appended());
  page.Counter("fetched_bytes_total", "Bytes that steps fetched from other ranks.",
               stats.bytes_fetched());
  page.Counter("step_rows_total", "New tokens of all steps.", stats.step_rows());

  const Histogram& histogram = stats.step_seconds();
  page.Head("step_seconds", "histogram", "What a step takes.");
  int64_t count = 0;
  for (int i = 0; i < histogram.counts_size(); ++i) {
    count += histogram.counts(i);
    const std::string bound = i < histogram.bounds_size() ? Number(histogram.bounds(i)) : "+Inf";
    page.Sample(count, absl::StrCat("le=\"", bound, "\""), "_bucket");
  }
  page.Sample(Number(histogram.sum()), "", "_sum");
  page.Sample(count, "", "_count");
  return page.text();
}

}  // namespace nsa::serving
