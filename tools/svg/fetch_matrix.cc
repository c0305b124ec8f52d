#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nsa/stats.h"
#include "tools/svg/canvas.h"
#include "tools/svg/drawings.h"

namespace nsa::tools {
namespace {

constexpr Rgb kLight = {0.93, 0.96, 0.99};
constexpr Rgb kDark = {0.03, 0.27, 0.52};

// One unit for the whole matrix, so that numbers can be compared and stay short.
struct Unit {
  const char* name;
  double bytes;
};
constexpr std::array<Unit, 4> kUnits = {
    {{"bytes", 1}, {"KiB", 1024}, {"MiB", 1024.0 * 1024}, {"GiB", 1024.0 * 1024 * 1024}}};

Unit UnitFor(double max_bytes) {
  Unit unit = kUnits[0];
  for (const Unit& candidate : kUnits) {
    if (max_bytes >= candidate.bytes) unit = candidate;
  }
  return unit;
}

// At most three digits, where the unit allows.
std::string Short(double value) {
  if (value == 0) return "0";
  if (value < 0.095) return "<.1";
  return absl::StrFormat(value < 9.95 ? "%.1f" : "%.0f", value);
}

class FetchDrawing {
 public:
  FetchDrawing(const ForwardStats& stats, absl::string_view title)
      : title_(title),
        num_ranks_(stats.ranks_size()),
        cell_(std::clamp(640.0 / num_ranks_, 26.0, 72.0)),
        grid_size_(cell_ * num_ranks_),
        totals_width_(std::max(cell_, 58.0)),
        width_(std::max(kLeft + grid_size_ + totals_width_ + 48, 560.0)),
        canvas_(width_, kTop + grid_size_ + cell_ + 118),
        bytes_(num_ranks_, std::vector<double>(num_ranks_)) {
    for (int to = 0; to < num_ranks_; ++to) {
      for (int from = 0; from < num_ranks_; ++from) {
        bytes_[from][to] = static_cast<double>(stats.ranks(to).block_bytes_from_rank(from));
        max_ = std::max(max_, bytes_[from][to]);
        total_ += bytes_[from][to];
      }
    }
    unit_ = UnitFor(max_);
  }

  std::string Draw() {
    canvas_.Text(24, 36, title_, {.size = 20, .bold = true});
    canvas_.Text(24, 58,
                 absl::StrCat("numbers in ", unit_.name, ", ", FormatBytes(total_), " in all"),
                 {.size = 13, .color = kMutedInk});
    DrawLabels();
    for (int from = 0; from < num_ranks_; ++from) {
      for (int to = 0; to < num_ranks_; ++to) DrawCell(from, to);
    }
    canvas_.Rect(kLeft, kTop, grid_size_, grid_size_, "none", kRule);
    DrawTotals();
    DrawLegend();
    return canvas_.Finish();
  }

 private:
  static constexpr double kLeft = 92;
  static constexpr double kTop = 124;

  double X(int rank) const { return kLeft + cell_ * rank; }
  double Y(int rank) const { return kTop + cell_ * rank; }
  double NumberSize() const { return std::clamp(cell_ * 0.3, 9.0, 14.0); }

  void DrawLabels() {
    const double size = std::clamp(cell_ * 0.32, 9.0, 13.0);
    canvas_.Text(kLeft + grid_size_ / 2, kTop - 30, "to: rank that fetched",
                 {.size = 13, .anchor = Anchor::kMiddle});
    canvas_.Text(34, kTop + grid_size_ / 2, "from: rank that owns",
                 {.size = 13, .anchor = Anchor::kMiddle, .rotate = -90});
    for (int rank = 0; rank < num_ranks_; ++rank) {
      canvas_.Text(X(rank) + cell_ / 2, kTop - 10, absl::StrCat(rank),
                   {.size = size, .anchor = Anchor::kMiddle});
      canvas_.Text(kLeft - 12, Y(rank) + cell_ / 2 + size * 0.36, absl::StrCat(rank),
                   {.size = size, .anchor = Anchor::kEnd});
    }
  }

  Rgb ColorOf(double bytes) const {
    return Mix(kLight, kDark, max_ > 0 ? std::sqrt(bytes / max_) : 0);
  }

  void DrawCell(int from, int to) {
    const double bytes = bytes_[from][to];
    if (from == to && bytes == 0) {
      canvas_.Rect(X(to), Y(from), cell_, cell_, kShade, "#ffffff",
                   absl::StrCat("rank ", from, " reads its own blocks in place"));
      canvas_.Line(X(to) + cell_ * 0.38, Y(from) + cell_ * 0.5, X(to) + cell_ * 0.62,
                   Y(from) + cell_ * 0.5, kRule, 1.5);
      return;
    }
    const Rgb color = ColorOf(bytes);
    canvas_.Rect(X(to), Y(from), cell_, cell_, HexColor(color), "#ffffff",
                 absl::StrCat("from rank ", from, " to rank ", to, ": ", FormatBytes(bytes)));
    canvas_.Text(X(to) + cell_ / 2, Y(from) + cell_ / 2 + NumberSize() * 0.36,
                 Short(bytes / unit_.bytes),
                 {.size = NumberSize(), .anchor = Anchor::kMiddle, .color = InkOn(color)});
  }

  void DrawTotals() {
    const double right = kLeft + grid_size_ + totals_width_;
    const double bottom = kTop + grid_size_;
    const TextStyle header = {.size = 12, .anchor = Anchor::kEnd, .color = kMutedInk};
    const TextStyle number = {.size = NumberSize(), .anchor = Anchor::kEnd};
    canvas_.Text(right, kTop - 10, "sent", header);
    canvas_.Text(kLeft - 12, bottom + cell_ / 2 + 4, "received", header);
    for (int rank = 0; rank < num_ranks_; ++rank) {
      double sent = 0;
      double received = 0;
      for (int peer = 0; peer < num_ranks_; ++peer) {
        sent += bytes_[rank][peer];
        received += bytes_[peer][rank];
      }
      canvas_.Text(right, Y(rank) + cell_ / 2 + NumberSize() * 0.36, Short(sent / unit_.bytes),
                   number);
      canvas_.Text(X(rank) + cell_ / 2, bottom + cell_ / 2 + 4, Short(received / unit_.bytes),
                   {.size = NumberSize(), .anchor = Anchor::kMiddle});
    }
  }

  void DrawLegend() {
    constexpr int kSteps = 48;
    constexpr double kBarWidth = 240;
    const double y = kTop + grid_size_ + cell_ + 34;
    for (int step = 0; step < kSteps; ++step) {
      canvas_.Rect(kLeft + kBarWidth * step / kSteps, y, kBarWidth / kSteps + 0.5, 14,
                   HexColor(ColorOf(max_ * (step + 0.5) / kSteps)));
    }
    const TextStyle style = {.size = 11, .color = kMutedInk};
    canvas_.Text(kLeft, y + 30, "0", style);
    canvas_.Text(kLeft + kBarWidth, y + 30, FormatBytes(max_),
                 {.size = 11, .anchor = Anchor::kEnd, .color = kMutedInk});
    canvas_.Rect(kLeft + kBarWidth + 36, y, 14, 14, kShade, kRule);
    canvas_.Text(kLeft + kBarWidth + 58, y + 12, "own blocks, read in place", style);
    canvas_.Text(kLeft, y + 52, "A block that several queries of a rank select travels once.",
                 style);
  }

  const std::string title_;
  const int num_ranks_;
  const double cell_;
  const double grid_size_;
  const double totals_width_;
  const double width_;
  SvgCanvas canvas_;
  std::vector<std::vector<double>> bytes_;  // [from][to]
  double max_ = 0;
  double total_ = 0;
  Unit unit_ = kUnits[0];
};

}  // namespace

absl::StatusOr<std::string> DrawFetchMatrix(const ForwardStats& stats, absl::string_view title) {
  if (stats.ranks_size() == 0) {
    return absl::InvalidArgumentError("ranks: is empty, must have at least one");
  }
  for (int rank = 0; rank < stats.ranks_size(); ++rank) {
    if (stats.ranks(rank).block_bytes_from_rank_size() != stats.ranks_size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("ranks[", rank, "].block_bytes_from_rank: has ",
                       stats.ranks(rank).block_bytes_from_rank_size(),
                       " entries, must have one for each of ", stats.ranks_size(), " ranks"));
    }
  }
  return FetchDrawing(stats, title).Draw();
}

}  // namespace nsa::tools
