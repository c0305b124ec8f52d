#include "examples/text/vectors.h"

#include <cmath>

namespace nsa::examples {
namespace {

constexpr int kBag = 32;         // n-grams in a bag
constexpr int kFinderBytes = 6;  // length of these
constexpr int kReaderBytes = 8;  // of the one that readers compare

uint64_t Mix(uint64_t z) {  // SplitMix64
  z += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Signs of a 64-bit hash as a vector.
Vector Signs(uint64_t hash) {
  Vector v;
  for (int i = 0; i < kDim; ++i) v[i] = (hash >> i) & 1 ? 1.0f : -1.0f;
  return v;
}

// Of the `length` bytes that end at `end` (included); bytes before the text count as 0.
uint64_t NgramHash(const std::string& text, int64_t end, int length, uint64_t seed) {
  uint64_t hash = Mix(seed);
  for (int64_t i = end - length + 1; i <= end; ++i) {
    hash = Mix(hash ^ (i < 0 ? 0 : static_cast<unsigned char>(text[i])));
  }
  return hash;
}

}  // namespace

Vector ByteVector(int byte) { return Signs(Mix(0xb17e0000 + byte)); }

Vector NgramOf(const std::string& text, int64_t end) {
  return Signs(NgramHash(text, end, kReaderBytes, 2));
}

Vector BagOf(const std::string& text, int64_t end) {
  Vector bag = {};
  for (int64_t i = end - kBag + 1; i <= end; ++i) {
    const Vector one = Signs(NgramHash(text, i, kFinderBytes, 1));
    for (int c = 0; c < kDim; ++c) bag[c] += one[c];
  }
  // As long as a vector of signs, also where the text repeats itself (a line of dashes).
  float square = 0;
  for (float x : bag) square += x * x;
  for (float& x : bag) x *= std::sqrt(kDim / square);
  return bag;
}

}  // namespace nsa::examples
