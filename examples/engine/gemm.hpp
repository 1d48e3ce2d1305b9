// Products of activations with a matrix that is read far more often than it is written: weights, keys,
// values.
//
// The matrix is stored in the order in which it is read: panels of 16 outputs, input after input.
//
//   panel p: | w[16p][0] ... w[16p+15][0] | w[16p][1] ... w[16p+15][1] | ...        zeros beyond the last
//   output
//
// Each number of a product is one chain of multiply-adds over ascending inputs, so it is the same whatever
// else is computed beside it: a token decoded alone, in a batch or in a prompt gives the same bits.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <span>

namespace engine {

class PackedMatrix {
 public:
  static constexpr std::ptrdiff_t panel = 16;

  PackedMatrix() = default;
  /// [outputs, inputs], all zeros.
  PackedMatrix(std::ptrdiff_t outputs, std::ptrdiff_t inputs);

  std::ptrdiff_t outputs() const { return outputs_; }
  std::ptrdiff_t inputs() const { return inputs_; }
  std::ptrdiff_t panels() const { return (outputs_ + panel - 1) / panel; }

  float& operator()(std::ptrdiff_t output, std::ptrdiff_t input) { return data_[index(output, input)]; }
  float operator()(std::ptrdiff_t output, std::ptrdiff_t input) const { return data_[index(output, input)]; }

  /// The 16 outputs of a panel from input `first` on: [inputs - first][16].
  const float* panel_data(std::ptrdiff_t p, std::ptrdiff_t first) const {
    return data_.data() + (p * inputs_ + first) * panel;
  }

 private:
  std::ptrdiff_t index(std::ptrdiff_t output, std::ptrdiff_t input) const {
    return (output / panel * inputs_ + input) * panel + output % panel;
  }

  std::ptrdiff_t outputs_ = 0;
  std::ptrdiff_t inputs_ = 0;
  Eigen::VectorXf data_;
};

/// A stretch of outputs or inputs.
struct Range {
  std::ptrdiff_t first = 0;
  std::ptrdiff_t count = 0;
};

/// Rows of floats, `stride` apart.
struct ConstRows {
  const float* data = nullptr;
  std::ptrdiff_t stride = 0;
};
struct Rows {
  float* data = nullptr;
  std::ptrdiff_t stride = 0;

  operator ConstRows() const { return {data, stride}; }
};

/// out[r][o - outputs.first] = sum over i of x[r][i - inputs.first] * w[o][i], for `rows` rows and the given
/// stretches; added to what is there where `add`. `outputs.first` must be a multiple of 16. One thread.
void multiply(ConstRows x, std::ptrdiff_t rows, const PackedMatrix& w, Range outputs, Range inputs, bool add,
              Rows out);

/// All outputs and inputs of `w`.
inline void multiply(ConstRows x, std::ptrdiff_t rows, const PackedMatrix& w, bool add, Rows out) {
  multiply(x, rows, w, {0, w.outputs()}, {0, w.inputs()}, add, out);
}

}  // namespace engine
