// Products of dense row-major matrices on the host.
#ifndef EXAMPLES_05_TRAINING_MATRIX_H_
#define EXAMPLES_05_TRAINING_MATRIX_H_

#include <cstdint>

namespace nsa::training {

// y [rows,n] += x [rows,m] w [m,n]
inline void Multiply(const float* x, const float* w, int64_t rows, int64_t m, int64_t n, float* y) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) y[row * n + j] += x[row * m + i] * w[i * n + j];
    }
  }
}

// Its backward: dx [rows,m] += dy [rows,n] w^T, and dw [m,n] += x^T dy.
inline void MultiplyBackward(const float* x, const float* w, const float* dy, int64_t rows,
                             int64_t m, int64_t n, float* dx, float* dw) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < m; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        sum += dy[row * n + j] * w[i * n + j];
        dw[i * n + j] += x[row * m + i] * dy[row * n + j];
      }
      dx[row * m + i] += sum;
    }
  }
}

}  // namespace nsa::training

#endif  // EXAMPLES_05_TRAINING_MATRIX_H_
