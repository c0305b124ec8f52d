#include "tools/svg/canvas.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace nsa::tools {
namespace {

std::string Number(double value) {
  std::string text = absl::StrFormat("%.2f", value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

const char* NameOf(Anchor anchor) {
  switch (anchor) {
    case Anchor::kStart:
      return "start";
    case Anchor::kMiddle:
      return "middle";
    case Anchor::kEnd:
      return "end";
  }
  return "start";
}

Rgb FromHsl(double hue_degrees, double saturation, double lightness) {
  auto channel = [&](double n) {
    const double k = std::fmod(n + hue_degrees / 30, 12);
    const double a = saturation * std::min(lightness, 1 - lightness);
    return lightness - a * std::max(-1.0, std::min({k - 3, 9 - k, 1.0}));
  };
  return {channel(0), channel(8), channel(4)};
}

}  // namespace

SvgCanvas::SvgCanvas(double width, double height) : width_(width), height_(height) {
  Rect(0, 0, width, height, "#ffffff");
}

void SvgCanvas::Rect(double x, double y, double width, double height, absl::string_view fill,
                     absl::string_view stroke, absl::string_view tooltip) {
  absl::StrAppend(&body_, "<rect x=\"", Number(x), "\" y=\"", Number(y), "\" width=\"",
                  Number(width), "\" height=\"", Number(height), "\" fill=\"", EscapeXml(fill),
                  "\"");
  if (!stroke.empty()) absl::StrAppend(&body_, " stroke=\"", EscapeXml(stroke), "\"");
  if (tooltip.empty()) {
    body_ += "/>\n";
  } else {
    absl::StrAppend(&body_, "><title>", EscapeXml(tooltip), "</title></rect>\n");
  }
}

void SvgCanvas::Line(double x1, double y1, double x2, double y2, absl::string_view stroke,
                     double stroke_width, bool dashed) {
  absl::StrAppend(&body_, "<line x1=\"", Number(x1), "\" y1=\"", Number(y1), "\" x2=\"", Number(x2),
                  "\" y2=\"", Number(y2), "\" stroke=\"", EscapeXml(stroke), "\" stroke-width=\"",
                  Number(stroke_width), "\"", dashed ? " stroke-dasharray=\"4 3\"" : "", "/>\n");
}

void SvgCanvas::Text(double x, double y, absl::string_view text, const TextStyle& style) {
  absl::StrAppend(&body_, "<text x=\"", Number(x), "\" y=\"", Number(y), "\" font-size=\"",
                  Number(style.size), "\" text-anchor=\"", NameOf(style.anchor), "\" fill=\"",
                  EscapeXml(style.color), "\"");
  if (style.bold) body_ += " font-weight=\"bold\"";
  if (style.rotate != 0) {
    absl::StrAppend(&body_, " transform=\"rotate(", Number(style.rotate), " ", Number(x), " ",
                    Number(y), ")\"");
  }
  absl::StrAppend(&body_, ">", EscapeXml(text), "</text>\n");
}

void SvgCanvas::GridPath(double x, double y, double scale_x, double scale_y, absl::string_view path,
                         absl::string_view fill) {
  // Crisp edges: anti-aliasing would leave seams between neighbouring squares. Scales need more
  // digits than places: their error adds up over the grid.
  absl::StrAppend(&body_, "<path transform=\"translate(", Number(x), " ", Number(y), ") scale(",
                  absl::StrFormat("%.6g %.6g", scale_x, scale_y),
                  ")\" shape-rendering=\"crispEdges\" fill=\"", EscapeXml(fill), "\" d=\"",
                  EscapeXml(path), "\"/>\n");
}

std::string SvgCanvas::Finish() const {
  return absl::StrCat(
      "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"",
      Number(width_), "\" height=\"", Number(height_), "\" viewBox=\"0 0 ", Number(width_), " ",
      Number(height_), "\" font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n", body_,
      "</svg>\n");
}

std::string EscapeXml(absl::string_view text) {
  std::string escaped;
  escaped.reserve(text.size());
  for (char c : text) {
    if (c == '&') {
      escaped += "&amp;";
    } else if (c == '<') {
      escaped += "&lt;";
    } else if (c == '>') {
      escaped += "&gt;";
    } else if (c == '"') {
      escaped += "&quot;";
    } else if (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') {
      escaped += ' ';
    } else {
      escaped += c;
    }
  }
  return escaped;
}

double TextWidth(absl::string_view text, double size) {
  return 0.62 * size * static_cast<double>(text.size());
}

std::string HexColor(const Rgb& color) {
  auto byte = [](double share) {
    return static_cast<int>(std::lround(std::clamp(share, 0.0, 1.0) * 255));
  };
  return absl::StrFormat("#%02x%02x%02x", byte(color.red), byte(color.green), byte(color.blue));
}

Rgb Mix(const Rgb& from, const Rgb& to, double share) {
  auto mix = [share](double a, double b) { return a + (b - a) * share; };
  return {mix(from.red, to.red), mix(from.green, to.green), mix(from.blue, to.blue)};
}

Rgb RankColor(int rank, int num_ranks) {
  // Up to eight ranks: colours that people with colour blindness tell apart too.
  static constexpr std::array<Rgb, 8> kFew = {{{0.30, 0.47, 0.66},
                                               {0.95, 0.56, 0.17},
                                               {0.35, 0.63, 0.31},
                                               {0.88, 0.34, 0.35},
                                               {0.46, 0.72, 0.70},
                                               {0.93, 0.79, 0.28},
                                               {0.69, 0.48, 0.63},
                                               {0.61, 0.46, 0.37}}};
  if (num_ranks <= static_cast<int>(kFew.size())) return kFew[rank];
  // Else most of the way around the colour circle, neighbours differing in lightness too.
  const double hue = 330.0 * rank / num_ranks;
  return FromHsl(hue, 0.55, rank % 2 == 0 ? 0.50 : 0.66);
}

std::string InkOn(const Rgb& background) {
  const double luminance =
      0.299 * background.red + 0.587 * background.green + 0.114 * background.blue;
  return luminance > 0.58 ? kInk : "#ffffff";
}

std::vector<int64_t> RoundTicks(int64_t end, int count) {
  // Powers of two suit token counts; otherwise 1, 2 or 5 times a power of ten.
  const double rough = static_cast<double>(std::max<int64_t>(end, 1)) / std::max(count, 1);
  double step = 1;
  if (end >= 1024 && end % 256 == 0) {
    step = std::exp2(std::ceil(std::log2(rough)));
  } else if (rough > 1) {
    const double power = std::pow(10.0, std::floor(std::log10(rough)));
    for (double factor : {1.0, 2.0, 5.0, 10.0}) {
      step = factor * power;
      if (step >= rough) break;
    }
  }
  std::vector<int64_t> ticks;
  const int64_t stride = std::max<int64_t>(1, static_cast<int64_t>(step));
  for (int64_t tick = 0; tick <= end; tick += stride) ticks.push_back(tick);
  return ticks;
}

std::string GroupDigits(int64_t number) {
  std::string digits = absl::StrCat(number);
  const size_t first = number < 0 ? 1 : 0;
  for (size_t place = digits.size(); place > first + 3;) {
    place -= 3;
    digits.insert(place, 1, ',');
  }
  return digits;
}

}  // namespace nsa::tools
