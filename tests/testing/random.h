// Random numbers that are the same with every standard library and on every host.
#ifndef TESTS_TESTING_RANDOM_H_
#define TESTS_TESTING_RANDOM_H_

#include <cstdint>
#include <initializer_list>

namespace nsa::test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // SplitMix64.
  uint64_t Next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  // In [0, 1).
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }

  // In [low, high], both included.
  int64_t Int(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Next() % static_cast<uint64_t>(high - low + 1));
  }

  bool OneIn(int64_t count) { return Int(1, count) == 1; }

  template <typename T>
  T Pick(std::initializer_list<T> values) {
    return values.begin()[Int(0, static_cast<int64_t>(values.size()) - 1)];
  }

  // Close to normal with mean 0 and variance 1: the sum of four uniforms, which needs no function
  // of the mathematical library, whose last bits differ between hosts.
  double Normal() {
    return (Uniform() + Uniform() + Uniform() + Uniform() - 2.0) * 1.7320508075688772;
  }

 private:
  uint64_t state_;
};

}  // namespace nsa::test

#endif  // TESTS_TESTING_RANDOM_H_
