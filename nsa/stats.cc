#include "nsa/stats.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace nsa {
namespace {

using Row = std::vector<std::string>;

struct Column {
  const char* title;
  std::function<double(const RankStats&)> value;
  std::function<std::string(double)> format;
};

std::string FormatCount(double count) { return absl::StrFormat("%.0f", count); }

std::string BytesTable(const ForwardStats& stats) {
  const std::vector<Column> columns = {
      {"tokens", [](const RankStats& s) { return s.num_tokens(); }, FormatCount},
      {"halo out", [](const RankStats& s) { return s.halo_bytes_sent(); }, FormatBytes},
      {"halo in", [](const RankStats& s) { return s.halo_bytes_received(); }, FormatBytes},
      {"summaries out", [](const RankStats& s) { return s.summary_bytes_sent(); }, FormatBytes},
      {"summaries in", [](const RankStats& s) { return s.summary_bytes_received(); }, FormatBytes},
      {"blocks out", [](const RankStats& s) { return s.block_bytes_sent(); }, FormatBytes},
      {"blocks in", [](const RankStats& s) { return s.block_bytes_received(); }, FormatBytes},
      {"remote picks", [](const RankStats& s) { return s.remote_picks(); }, FormatCount},
      {"fetched", [](const RankStats& s) { return s.records_fetched(); }, FormatCount},
      {"pieces", [](const RankStats& s) { return s.query_pieces(); }, FormatCount},
      {"memory", [](const RankStats& s) { return s.workspace_bytes(); }, FormatBytes},
  };
  std::vector<Row> rows(1, {"rank"});
  Row total = {"all"};
  for (const Column& column : columns) {
    rows[0].push_back(column.title);
    double sum = 0;
    for (const RankStats& rank : stats.ranks()) sum += column.value(rank);
    total.push_back(column.format(sum));
  }
  for (const RankStats& rank : stats.ranks()) {
    Row row = {absl::StrCat(rank.rank())};
    for (const Column& column : columns) row.push_back(column.format(column.value(rank)));
    rows.push_back(std::move(row));
  }
  rows.push_back(std::move(total));
  return FormatRows(rows);
}

std::string LoadTable(const ForwardStats& stats) {
  double mean_flops = 0;
  std::vector<std::string> stages;  // of all ranks, in order of first appearance
  for (const RankStats& rank : stats.ranks()) {
    mean_flops += rank.flops() / stats.ranks_size();
    for (const StageSpan& span : rank.stages()) {
      if (std::find(stages.begin(), stages.end(), span.stage()) == stages.end()) {
        stages.push_back(span.stage());
      }
    }
  }
  std::vector<Row> rows(1, {"rank", "GFLOP", "load"});
  for (const std::string& stage : stages) rows[0].push_back(stage + " ms");
  if (!stages.empty()) rows[0].push_back("total ms");
  for (const RankStats& rank : stats.ranks()) {
    Row row = {absl::StrCat(rank.rank()), absl::StrFormat("%.1f", rank.flops() * 1e-9),
               absl::StrFormat("%.2f", mean_flops > 0 ? rank.flops() / mean_flops : 0)};
    double end = 0;
    for (const std::string& stage : stages) {
      double seconds = 0;
      for (const StageSpan& span : rank.stages()) {
        if (span.stage() == stage) seconds += span.end_seconds() - span.begin_seconds();
        end = std::max(end, span.end_seconds());
      }
      row.push_back(absl::StrFormat("%.3f", seconds * 1e3));
    }
    if (!stages.empty()) row.push_back(absl::StrFormat("%.3f", end * 1e3));
    rows.push_back(std::move(row));
  }
  return FormatRows(rows);
}

}  // namespace

std::string FormatRows(const std::vector<Row>& rows) {
  std::vector<size_t> widths;
  for (const Row& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const Row& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      absl::StrAppend(&text, "  ", std::string(widths[i] - row[i].size(), ' '), row[i]);
    }
    text += "\n";
  }
  return text;
}

std::string FormatBytes(double num_bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (num_bytes >= 1024 && unit < 4) {
    num_bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? absl::StrFormat("%.0f B", num_bytes)
                   : absl::StrFormat("%.2f %s", num_bytes, kUnits[unit]);
}

std::string FormatTable(const ForwardStats& stats) {
  return absl::StrCat(BytesTable(stats), "\n", LoadTable(stats));
}

std::string FormatChromeTrace(const ForwardStats& stats) {
  constexpr const char* kTracks[] = {"host", "main", "beside"};
  std::vector<std::string> events;
  for (const RankStats& rank : stats.ranks()) {
    events.push_back(
        absl::StrFormat(R"({"ph":"M","name":"process_name","pid":%d,"args":{"name":"rank %d"}})",
                        rank.rank(), rank.rank()));
    for (int track = 0; track < 3; ++track) {
      events.push_back(absl::StrFormat(
          R"({"ph":"M","name":"thread_name","pid":%d,"tid":%d,"args":{"name":"%s"}})", rank.rank(),
          track, kTracks[track]));
    }
    for (const StageSpan& span : rank.stages()) {
      const auto track = std::find(std::begin(kTracks), std::end(kTracks), span.track());
      events.push_back(absl::StrFormat(
          R"({"ph":"X","name":"%s","pid":%d,"tid":%d,"ts":%.3f,"dur":%.3f})", span.stage(),
          rank.rank(), track - std::begin(kTracks), span.begin_seconds() * 1e6,
          (span.end_seconds() - span.begin_seconds()) * 1e6));
    }
  }
  return absl::StrCat("{\"traceEvents\":[\n", absl::StrJoin(events, ",\n"), "\n]}\n");
}

}  // namespace nsa
