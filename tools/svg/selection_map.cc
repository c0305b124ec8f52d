#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tools/svg/canvas.h"
#include "tools/svg/drawings.h"

namespace nsa::tools {
namespace {

constexpr int64_t kMaxCells = 512;
constexpr double kLeft = 112;
constexpr double kTop = 112;
constexpr double kPlot = 640;
constexpr double kStrip = 10;  // of rank colours, above and beside the plot

constexpr Rgb kWhite = {1, 1, 1};
constexpr Rgb kForced = {0.93, 0.49, 0.08};
constexpr Rgb kChosen = {0.10, 0.32, 0.66};
constexpr int kShades = 6;

// What the darkest shade of a cell stands for.
std::string DarkestLabel(double share) {
  if (share > 0.995) return "100%";
  return absl::StrFormat(share >= 0.1 ? "%.0f%% or more" : "%.2g%% or more", 100 * share);
}

// Picks that fell into one cell.
struct Cell {
  int64_t forced = 0;
  int64_t chosen = 0;
};

// Things 0..count-1 in `num_cells` cells of nearly equal size.
struct Axis {
  int64_t count;
  int64_t num_cells;

  explicit Axis(int64_t count) : count(count), num_cells(std::min(count, kMaxCells)) {}
  int64_t CellOf(int64_t index) const { return index * num_cells / count; }
  int64_t Begin(int64_t cell) const { return (cell * count + num_cells - 1) / num_cells; }
  int64_t SizeOf(int64_t cell) const { return Begin(cell + 1) - Begin(cell); }
};

class SelectionDrawing {
 public:
  explicit SelectionDrawing(const SelectionMapInput& input)
      : input_(input),
        queries_(input.plan.num_tokens()),
        blocks_(input.blocks.num_slc_blocks),
        scale_x_(kPlot / static_cast<double>(blocks_.num_cells)),
        scale_y_(kPlot / static_cast<double>(queries_.num_cells)),
        cells_(blocks_.num_cells * queries_.num_cells),
        canvas_(kLeft + kPlot + 56, kTop + kPlot + 156) {}

  absl::StatusOr<std::string> Draw() {
    if (absl::Status status = Count(); !status.ok()) return status;
    canvas_.Text(24, 36,
                 input_.title.empty()
                     ? absl::StrCat("Blocks that queries select, kv head ", input_.kv_head)
                     : input_.title,
                 {.size = 20, .bold = true});
    canvas_.Text(24, 58,
                 absl::StrCat(input_.config.num_selected_blocks, " blocks of ",
                              input_.config.select_block_tokens, " tokens a query; the first ",
                              input_.config.num_initial_blocks, " and the last ",
                              input_.config.num_local_blocks, " are forced"),
                 {.size = 13, .color = kMutedInk});
    DrawVisible();
    DrawCells();
    DrawDocuments();
    canvas_.Rect(kLeft, kTop, kPlot, kPlot, "none", kMutedInk);
    DrawRanks();
    DrawAxes();
    DrawLegend();
    return canvas_.Finish();
  }

 private:
  double X(double block) const {
    return kLeft + kPlot * block / static_cast<double>(blocks_.count);
  }
  double Y(double token) const {
    return kTop + kPlot * token / static_cast<double>(queries_.count);
  }
  Cell& CellAt(int64_t row, int64_t column) { return cells_[row * blocks_.num_cells + column]; }

  absl::Status Count() {
    const int64_t n = input_.config.num_selected_blocks;
    const int64_t block_tokens = input_.config.select_block_tokens;
    if (static_cast<int64_t>(input_.block_indices.size()) != queries_.count * n) {
      return absl::InvalidArgumentError(
          absl::StrCat("block_indices: has ", input_.block_indices.size(), " entries, must have ",
                       queries_.count, " x ", n));
    }
    for (const kernels::Document& document : input_.blocks.documents) {
      for (int64_t position = 0; position < document.num_tokens; ++position) {
        const int64_t token = document.token_begin + position;
        const int64_t row = queries_.CellOf(token);
        const int64_t own_block = position / block_tokens;
        for (int32_t block : input_.block_indices.subspan(token * n, n)) {
          if (block == -1) continue;
          if (block < 0 || block > own_block) {
            return absl::InvalidArgumentError(
                absl::StrCat("block_indices of token ", token, ": ", block,
                             ": must be -1 or a block up to the query's own, ", own_block));
          }
          Cell& cell = CellAt(row, blocks_.CellOf(document.slc_block_begin + block));
          const bool forced = block < input_.config.num_initial_blocks ||
                              block > own_block - input_.config.num_local_blocks;
          ++(forced ? cell.forced : cell.chosen);
        }
      }
    }
    return absl::OkStatus();
  }

  // What a query could select at all is white, the rest shaded.
  void DrawVisible() {
    canvas_.Rect(kLeft, kTop, kPlot, kPlot, kShade);
    std::string path;
    for (const kernels::Document& document : input_.blocks.documents) {
      const int64_t first_row = queries_.CellOf(document.token_begin);
      const int64_t last_row = queries_.CellOf(document.token_begin + document.num_tokens - 1);
      const int64_t begin = blocks_.CellOf(document.slc_block_begin);
      for (int64_t row = first_row; row <= last_row; ++row) {
        const int64_t last_token =
            std::min(queries_.Begin(row + 1), document.token_begin + document.num_tokens) - 1;
        const int64_t own_block =
            (last_token - document.token_begin) / input_.config.select_block_tokens;
        AppendRun(row, begin, blocks_.CellOf(document.slc_block_begin + own_block) + 1, path);
      }
    }
    canvas_.GridPath(kLeft, kTop, scale_x_, scale_y_, path, HexColor(kWhite));
  }

  static void AppendRun(int64_t row, int64_t begin, int64_t end, std::string& path) {
    absl::StrAppend(&path, "M", begin, " ", row, "h", end - begin, "v1h", begin - end, "z");
  }

  // Cells of one colour become one path, runs of them one rectangle in it.
  void DrawCells() {
    full_forced_ = FullShade(&Cell::forced);
    full_chosen_ = FullShade(&Cell::chosen);
    std::map<std::pair<int, int>, std::string> paths;  // by shades of forced and chosen
    for (int64_t row = 0; row < queries_.num_cells; ++row) {
      int64_t begin = 0;
      std::pair<int, int> last = ShadesAt(row, 0);
      for (int64_t column = 1; column <= blocks_.num_cells; ++column) {
        const bool at_end = column == blocks_.num_cells;
        const std::pair<int, int> next = at_end ? std::pair(-1, -1) : ShadesAt(row, column);
        if (next == last) continue;
        if (last != std::pair(0, 0)) AppendRun(row, begin, column, paths[last]);
        begin = column;
        last = next;
      }
    }
    for (const auto& [shades, path] : paths) {
      canvas_.GridPath(kLeft, kTop, scale_x_, scale_y_, path,
                       HexColor(ColorOf(shades.first, shades.second)));
    }
  }

  // The share that gets the darkest shade: nearly the highest one. The first queries select all
  // there is, which would leave the others pale.
  double FullShade(int64_t Cell::*kind) {
    std::vector<double> shares;
    for (int64_t row = 0; row < queries_.num_cells; ++row) {
      for (int64_t column = 0; column < blocks_.num_cells; ++column) {
        const int64_t picks = CellAt(row, column).*kind;
        if (picks > 0) shares.push_back(Share(row, column, picks));
      }
    }
    if (shares.empty()) return 0;
    const auto place = shares.begin() + static_cast<int64_t>(0.97 * (shares.size() - 1));
    std::nth_element(shares.begin(), place, shares.end());
    return *place;
  }

  double Share(int64_t row, int64_t column, int64_t picks) const {
    return static_cast<double>(picks) /
           static_cast<double>(queries_.SizeOf(row) * blocks_.SizeOf(column));
  }

  std::pair<int, int> ShadesAt(int64_t row, int64_t column) {
    // The root makes rare picks visible beside frequent ones.
    auto shade = [](double share, double full) {
      if (share == 0) return 0;
      const double part = std::sqrt(std::min(1.0, share / full));
      return std::max(1, static_cast<int>(std::lround(kShades * part)));
    };
    const Cell& cell = CellAt(row, column);
    return {shade(Share(row, column, cell.forced), full_forced_),
            shade(Share(row, column, cell.chosen), full_chosen_)};
  }

  static Rgb ColorOf(int forced, int chosen) {
    const Rgb a = Mix(kWhite, kForced, 1.0 * forced / kShades);
    const Rgb b = Mix(kWhite, kChosen, 1.0 * chosen / kShades);
    return {a.red * b.red, a.green * b.green, a.blue * b.blue};
  }

  void DrawDocuments() {
    for (const kernels::Document& document : input_.blocks.documents) {
      if (document.token_begin == 0) continue;
      const double x = X(static_cast<double>(document.slc_block_begin));
      const double y = Y(static_cast<double>(document.token_begin));
      canvas_.Line(kLeft, y, kLeft + kPlot, y, kMutedInk, 0.7, /*dashed=*/true);
      canvas_.Line(x, kTop, x, kTop + kPlot, kMutedInk, 0.7, /*dashed=*/true);
    }
  }

  // Who owns the blocks, above; who holds the queries, at the left.
  void DrawRanks() {
    const int num_ranks = input_.plan.num_ranks();
    const std::vector<int32_t>& owner = input_.blocks.slc_owner;
    for (int64_t begin = 0; begin < blocks_.num_cells;) {
      const int32_t rank = owner[blocks_.Begin(begin)];
      int64_t end = begin + 1;
      while (end < blocks_.num_cells && owner[blocks_.Begin(end)] == rank) ++end;
      canvas_.Rect(kLeft + scale_x_ * static_cast<double>(begin), kTop - kStrip - 4,
                   scale_x_ * static_cast<double>(end - begin), kStrip,
                   HexColor(RankColor(rank, num_ranks)), "",
                   absl::StrCat("blocks owned by rank ", rank));
      const std::string label = absl::StrCat(rank);
      const double width = scale_x_ * static_cast<double>(end - begin);
      if (width > TextWidth(label, 11) + 2) {
        canvas_.Text(kLeft + scale_x_ * static_cast<double>(begin) + width / 2, kTop - kStrip - 9,
                     label, {.size = 11, .anchor = Anchor::kMiddle, .color = kMutedInk});
      }
      begin = end;
    }
    for (int64_t begin = 0; begin < queries_.num_cells;) {
      const int32_t rank = input_.plan.Locate(queries_.Begin(begin)).rank;
      int64_t end = begin + 1;
      while (end < queries_.num_cells && input_.plan.Locate(queries_.Begin(end)).rank == rank)
        ++end;
      canvas_.Rect(kLeft - kStrip - 4, kTop + scale_y_ * static_cast<double>(begin), kStrip,
                   scale_y_ * static_cast<double>(end - begin),
                   HexColor(RankColor(rank, num_ranks)), "",
                   absl::StrCat("queries of rank ", rank));
      begin = end;
    }
  }

  void DrawAxes() {
    const double bottom = kTop + kPlot;
    for (int64_t tick : RoundTicks(blocks_.count, 8)) {
      const double x = X(static_cast<double>(tick));
      canvas_.Line(x, bottom, x, bottom + 5, kMutedInk);
      canvas_.Text(x, bottom + 18, GroupDigits(tick),
                   {.size = 11, .anchor = Anchor::kMiddle, .color = kMutedInk});
    }
    canvas_.Text(kLeft - 6, kTop - kStrip - 9, "rank",
                 {.size = 11, .anchor = Anchor::kEnd, .color = kMutedInk});
    canvas_.Text(kLeft + kPlot / 2, bottom + 38, "select block",
                 {.size = 13, .anchor = Anchor::kMiddle});
    for (int64_t tick : RoundTicks(queries_.count, 8)) {
      const double y = Y(static_cast<double>(tick));
      canvas_.Line(kLeft - kStrip - 9, y, kLeft - kStrip - 4, y, kMutedInk);
      canvas_.Text(kLeft - kStrip - 13, y + 4, GroupDigits(tick),
                   {.size = 11, .anchor = Anchor::kEnd, .color = kMutedInk});
    }
    canvas_.Text(26, kTop + kPlot / 2, "query token",
                 {.size = 13, .anchor = Anchor::kMiddle, .rotate = -90});
  }

  void DrawLegend() {
    const double top = kTop + kPlot + 60;
    const TextStyle style = {.size = 12, .color = kMutedInk};
    auto ramp = [&](double y, bool forced, double full, absl::string_view what) {
      for (int shade = 1; shade <= kShades; ++shade) {
        canvas_.Rect(kLeft + 12.0 * (shade - 1), y - 10, 12, 12,
                     HexColor(ColorOf(forced ? shade : 0, forced ? 0 : shade)));
      }
      canvas_.Text(kLeft + 84, y,
                   full > 0 ? absl::StrCat(what, "; darkest: ", DarkestLabel(full),
                                           " of a cell's (query, block) pairs")
                            : absl::StrCat(what, ": none"),
                   style);
    };
    ramp(top, true, full_forced_, "forced");
    ramp(top + 22, false, full_chosen_, "chosen by score");
    double x = kLeft;
    const double y = top + 44;
    canvas_.Rect(x, y - 10, 12, 12, kShade, kRule);
    canvas_.Text(x + 20, y, "later than the query, or another document", style);
    x += 290;
    for (int rank = 0; rank < std::min(input_.plan.num_ranks(), 3); ++rank, x += 12) {
      canvas_.Rect(x, y - 10, 12, 12, HexColor(RankColor(rank, input_.plan.num_ranks())));
    }
    canvas_.Text(x + 8, y, "rank that owns the blocks (above), the queries (left)", style);
  }

  const SelectionMapInput& input_;
  const Axis queries_;
  const Axis blocks_;
  const double scale_x_;
  const double scale_y_;
  std::vector<Cell> cells_;  // [query cells, block cells]
  double full_forced_ = 0;
  double full_chosen_ = 0;
  SvgCanvas canvas_;
};

}  // namespace

absl::StatusOr<std::string> DrawSelectionMap(const SelectionMapInput& input) {
  return SelectionDrawing(input).Draw();
}

}  // namespace nsa::tools
