// Writing SVG: shapes and text in pixels from the top left, and what drawings share: colours of
// ranks, axis ticks, numbers as people read them.
#ifndef TOOLS_SVG_CANVAS_H_
#define TOOLS_SVG_CANVAS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace nsa::tools {

struct Rgb {
  double red = 0;  // each in [0, 1]
  double green = 0;
  double blue = 0;
};

inline constexpr char kInk[] = "#1f2933";
inline constexpr char kMutedInk[] = "#616e7c";
inline constexpr char kRule[] = "#cbd2d9";
inline constexpr char kShade[] = "#eef1f4";

enum class Anchor { kStart, kMiddle, kEnd };

struct TextStyle {
  double size = 12;
  Anchor anchor = Anchor::kStart;
  bool bold = false;
  std::string color = kInk;
  double rotate = 0;  // degrees, around the text's own place
};

// A white picture. Coordinates are rounded to hundredths of a pixel.
class SvgCanvas {
 public:
  SvgCanvas(double width, double height);

  // `tooltip`, when not empty, shows where the mouse rests on the shape.
  void Rect(double x, double y, double width, double height, absl::string_view fill,
            absl::string_view stroke = "", absl::string_view tooltip = "");
  void Line(double x1, double y1, double x2, double y2, absl::string_view stroke,
            double stroke_width = 1, bool dashed = false);
  // `y` is the text's base line.
  void Text(double x, double y, absl::string_view text, const TextStyle& style = {});
  // Unit squares of a grid that lies with its corner at (x, y), each `scale_x` by `scale_y` pixels.
  // `path` is SVG path data in units of squares.
  void GridPath(double x, double y, double scale_x, double scale_y, absl::string_view path,
                absl::string_view fill);

  // The finished document.
  std::string Finish() const;

 private:
  double width_;
  double height_;
  std::string body_;
};

// '&', '<', '>' and quotes as XML wants them; control characters, which XML has no way to hold, as
// spaces.
std::string EscapeXml(absl::string_view text);

// Width of `text` in a usual sans-serif face, a little too wide rather than too narrow.
double TextWidth(absl::string_view text, double size);

std::string HexColor(const Rgb& color);
Rgb Mix(const Rgb& from, const Rgb& to, double share);
// Colours that tell neighbouring ranks apart, for any number of ranks.
Rgb RankColor(int rank, int num_ranks);
// Text on `background`: dark or white, whichever can be read.
std::string InkOn(const Rgb& background);

// About `count` round numbers in [0, end], beginning with 0.
std::vector<int64_t> RoundTicks(int64_t end, int count);

// "1,048,576".
std::string GroupDigits(int64_t number);

}  // namespace nsa::tools

#endif  // TOOLS_SVG_CANVAS_H_
