// Random vectors of signs for what stands in a text; see text_tensors.h.
#ifndef EXAMPLES_TEXT_VECTORS_H_
#define EXAMPLES_TEXT_VECTORS_H_

#include <array>
#include <cstdint>
#include <string>

namespace nsa::examples {

constexpr int kDim = 64;  // of every head
using Vector = std::array<float, kDim>;

Vector ByteVector(int byte);
// Of the text up to and with `end`: the readers' vector, and the finders', of the same length.
Vector NgramOf(const std::string& text, int64_t end);
Vector BagOf(const std::string& text, int64_t end);

}  // namespace nsa::examples

#endif  // EXAMPLES_TEXT_VECTORS_H_
