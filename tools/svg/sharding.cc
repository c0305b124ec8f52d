#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tools/svg/canvas.h"
#include "tools/svg/drawings.h"

namespace nsa::tools {
namespace {

constexpr double kWidth = 1200;
constexpr double kLeft = 90;
constexpr double kPlotWidth = 1000;
constexpr double kBarTop = 124;
constexpr double kBarHeight = 36;
constexpr double kLanesTop = kBarTop + kBarHeight + 34;

// More chunks than this are drawn by column instead of one by one.
constexpr size_t kMaxShapes = 2000;
constexpr int kColumns = 1000;
// Boundaries of more documents than this would hide the chunks: they are ticks above the bar.
constexpr size_t kMaxBoundaryLines = 120;

class ShardingDrawing {
 public:
  explicit ShardingDrawing(const ShardPlan& plan)
      : plan_(plan),
        num_ranks_(plan.num_ranks()),
        lane_height_(num_ranks_ <= 64 ? std::clamp(440.0 / num_ranks_, 9.0, 26.0)
                                      : 576.0 / num_ranks_),
        lanes_bottom_(kLanesTop + lane_height_ * num_ranks_),
        canvas_(kWidth, lanes_bottom_ + 92) {}

  std::string Draw() {
    DrawTitle();
    DrawLaneLabels();
    if (plan_.chunks().size() <= kMaxShapes) {
      for (const Chunk& chunk : plan_.chunks()) DrawChunk(chunk);
    } else {
      DrawColumns();
    }
    canvas_.Rect(kLeft, kBarTop, kPlotWidth, kBarHeight, "none", kMutedInk);
    DrawDocuments();
    DrawAxis();
    DrawLegend();
    return canvas_.Finish();
  }

 private:
  double X(int64_t token) const {
    return kLeft +
           kPlotWidth * static_cast<double>(token) / static_cast<double>(plan_.num_tokens());
  }
  double LaneTop(int rank) const { return kLanesTop + lane_height_ * rank; }
  double LaneGap() const { return lane_height_ >= 9 ? 1 : 0; }

  void DrawTitle() {
    canvas_.Text(kLeft, 36,
                 absl::StrCat("Sharding of ", GroupDigits(plan_.num_tokens()), " tokens over ",
                              num_ranks_, num_ranks_ == 1 ? " rank" : " ranks"),
                 {.size = 20, .bold = true});
    const size_t documents = plan_.cu_seqlens().size() - 1;
    canvas_.Text(kLeft, 58,
                 absl::StrCat(GroupDigits(plan_.chunks().size()),
                              plan_.chunks().size() == 1 ? " chunk, " : " chunks, ",
                              GroupDigits(documents), documents == 1 ? " document" : " documents"),
                 {.size = 13, .color = kMutedInk});
  }

  void DrawLaneLabels() {
    const double size = std::clamp(lane_height_ - 1, 8.0, 12.0);
    const int step = std::max(1, static_cast<int>(std::ceil(9 / lane_height_)));
    const TextStyle header = {.size = 12, .anchor = Anchor::kEnd, .color = kMutedInk};
    canvas_.Text(kLeft - 10, kBarTop + kBarHeight / 2 + 4, "all ranks",
                 {.size = 12, .anchor = Anchor::kEnd});
    canvas_.Text(kLeft - 10, kLanesTop - 8, "rank", header);
    canvas_.Text(kWidth - 24, kLanesTop - 8, "tokens", header);
    for (int rank = 0; rank < num_ranks_; ++rank) {
      canvas_.Rect(kLeft, LaneTop(rank), kPlotWidth, lane_height_ - LaneGap(), kShade);
      if (rank % step != 0) continue;
      const double baseline = LaneTop(rank) + lane_height_ / 2 + size * 0.36;
      canvas_.Text(kLeft - 10, baseline, absl::StrCat(rank),
                   {.size = size, .anchor = Anchor::kEnd});
      canvas_.Text(kWidth - 24, baseline, GroupDigits(plan_.TokensOfRank(rank)),
                   {.size = size, .anchor = Anchor::kEnd, .color = kMutedInk});
    }
  }

  void DrawChunk(const Chunk& chunk) {
    const Rgb color = RankColor(chunk.rank, num_ranks_);
    const double left = X(chunk.begin);
    // A chunk too short to be seen is still drawn.
    const double width = std::max(X(chunk.end()) - left, 0.4);
    const std::string tooltip = absl::StrCat("rank ", chunk.rank, ": tokens ", chunk.begin, " to ",
                                             chunk.end() - 1, " (", chunk.num_tokens, ")");
    // White edges between chunks where there is room for them.
    const std::string edge = width > 4 ? "#ffffff" : "";
    canvas_.Rect(left, kBarTop, width, kBarHeight, HexColor(color), edge, tooltip);
    canvas_.Rect(left, LaneTop(chunk.rank), width, lane_height_ - LaneGap(), HexColor(color), "",
                 tooltip);
    const std::string label = absl::StrCat(chunk.rank);
    if (width >= TextWidth(label, 12) + 4) {
      canvas_.Text(left + width / 2, kBarTop + kBarHeight / 2 + 4, label,
                   {.size = 12, .anchor = Anchor::kMiddle, .bold = true, .color = InkOn(color)});
    }
  }

  // The bar shows the rank of each column's middle token; a lane shows every column it is in.
  void DrawColumns() {
    const double column_width = kPlotWidth / kColumns;
    const int64_t tokens = plan_.num_tokens();
    std::vector<std::vector<bool>> in_column(num_ranks_, std::vector<bool>(kColumns));
    for (const Chunk& chunk : plan_.chunks()) {
      const int64_t first = chunk.begin * kColumns / tokens;
      const int64_t last = (chunk.end() - 1) * kColumns / tokens;
      for (int64_t column = first; column <= last; ++column) in_column[chunk.rank][column] = true;
    }
    for (int column = 0; column < kColumns; ++column) {
      const int rank = plan_.Locate((2 * column + 1) * tokens / (2 * kColumns)).rank;
      canvas_.Rect(kLeft + column * column_width, kBarTop, column_width, kBarHeight,
                   HexColor(RankColor(rank, num_ranks_)));
    }
    for (int rank = 0; rank < num_ranks_; ++rank) {
      for (int begin = 0; begin < kColumns;) {
        int end = begin;
        while (end < kColumns && in_column[rank][end]) ++end;
        if (end > begin) {
          canvas_.Rect(kLeft + begin * column_width, LaneTop(rank), (end - begin) * column_width,
                       lane_height_ - LaneGap(), HexColor(RankColor(rank, num_ranks_)));
        }
        begin = end + 1;
      }
    }
  }

  void DrawDocuments() {
    const std::vector<int64_t>& ends = plan_.cu_seqlens();
    const double top = kBarTop - 14;
    double last_boundary = kLeft;
    for (size_t i = 0; i + 1 < ends.size(); ++i) {
      const double left = X(ends[i]);
      const double right = X(ends[i + 1]);
      if (i + 2 < ends.size() && right - last_boundary >= 1.5) {
        if (ends.size() <= kMaxBoundaryLines) {
          canvas_.Line(right, top - 6, right, lanes_bottom_, kInk, 1, /*dashed=*/true);
        } else {
          canvas_.Line(right, top - 4, right, top + 8, kMutedInk, 0.7);
        }
        last_boundary = right;
      }
      if (right - left > 6) canvas_.Line(left + 2, top, right - 2, top, kMutedInk, 1.5);
      for (const std::string& label :
           {absl::StrCat("document ", i, ": ", GroupDigits(ends[i + 1] - ends[i])),
            absl::StrCat("doc ", i), absl::StrCat(i)}) {
        if (right - left < TextWidth(label, 11) + 6) continue;
        canvas_.Text((left + right) / 2, top - 7, label,
                     {.size = 11, .anchor = Anchor::kMiddle, .color = kMutedInk});
        break;
      }
    }
  }

  void DrawAxis() {
    const double y = lanes_bottom_ + 4;
    canvas_.Line(kLeft, y, kLeft + kPlotWidth, y, kMutedInk);
    for (int64_t tick : RoundTicks(plan_.num_tokens(), 10)) {
      canvas_.Line(X(tick), y, X(tick), y + 5, kMutedInk);
      canvas_.Text(X(tick), y + 18, GroupDigits(tick),
                   {.size = 11, .anchor = Anchor::kMiddle, .color = kMutedInk});
    }
    canvas_.Text(kLeft + kPlotWidth / 2, y + 38, "global token",
                 {.size = 13, .anchor = Anchor::kMiddle});
  }

  void DrawLegend() {
    const double y = lanes_bottom_ + 70;
    const TextStyle style = {.size = 12, .color = kMutedInk};
    double x = kLeft;
    for (int rank = 0; rank < std::min(num_ranks_, 3); ++rank, x += 12) {
      canvas_.Rect(x, y - 10, 12, 12, HexColor(RankColor(rank, num_ranks_)));
    }
    canvas_.Text(x + 8, y, "tokens of one rank, in the rank's colour", style);
    x += 290;
    const bool lines = plan_.cu_seqlens().size() <= kMaxBoundaryLines;
    canvas_.Line(x + 6, y - 11, x + 6, y + 3, lines ? kInk : kMutedInk, 1, lines);
    canvas_.Text(x + 16, y, "document boundary", style);
  }

  const ShardPlan& plan_;
  const int num_ranks_;
  const double lane_height_;
  const double lanes_bottom_;
  SvgCanvas canvas_;
};

}  // namespace

std::string DrawSharding(const ShardPlan& plan) { return ShardingDrawing(plan).Draw(); }

}  // namespace nsa::tools
