#include "gemm.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace engine {
namespace {

using Index = std::ptrdiff_t;

// Eight floats, which the compiler maps to the registers that there are.
using Lanes [[gnu::vector_size(32)]] = float;

constexpr Index panel = PackedMatrix::panel;
constexpr Index most_rows = 6;      // 6 rows of 16 outputs: 12 accumulators of 8 lanes, out of 16 registers
constexpr Index input_block = 256;  // of one panel: 16 KiB, which stay in the first-level cache

Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

// Sums of `rows` rows against one panel. x: [count][rows], w: [count][16].
template <int rows>
void kernel(const float* x, const float* w, Index count, bool add, float* out, Index stride) {
  Lanes low[static_cast<std::size_t>(rows)];
  Lanes high[static_cast<std::size_t>(rows)];
  for (int r = 0; r < rows; ++r) {
    low[r] = add ? load(out + r * stride) : Lanes{};
    high[r] = add ? load(out + r * stride + 8) : Lanes{};
  }
  for (Index i = 0; i < count; ++i, x += rows, w += panel) {
    const Lanes w_low = load(w);
    const Lanes w_high = load(w + 8);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      low[r] += w_low * x[r];
      high[r] += w_high * x[r];
    }
  }
  for (int r = 0; r < rows; ++r) {
    store(out + r * stride, low[r]);
    store(out + r * stride + 8, high[r]);
  }
}

using Kernel = void (*)(const float*, const float*, Index, bool, float*, Index);
constexpr Kernel kernels[most_rows] = {kernel<1>, kernel<2>, kernel<3>, kernel<4>, kernel<5>, kernel<6>};

// The last panel of a matrix may reach beyond the outputs: it goes through a full one on the side.
void partial_panel(Kernel kernel_of_rows, const float* x, const float* w, Index count, bool add, float* out,
                   Index stride, Index rows, Index width) {
  float full[most_rows * panel] = {};
  for (Index r = 0; add && r < rows; ++r) std::copy_n(out + r * stride, width, full + r * panel);
  kernel_of_rows(x, w, count, add, full, panel);
  for (Index r = 0; r < rows; ++r) std::copy_n(full + r * panel, width, out + r * stride);
}

}  // namespace

PackedMatrix::PackedMatrix(std::ptrdiff_t outputs, std::ptrdiff_t inputs)
    : outputs_{outputs}, inputs_{inputs} {
  data_.setZero(panels() * panel * inputs);
}

void multiply(ConstRows x, std::ptrdiff_t rows, const PackedMatrix& w, Range outputs, Range inputs, bool add,
              Rows out) {
  std::vector<float> packed(static_cast<std::size_t>(rows * std::min(inputs.count, input_block)));
  for (Index block = 0; block < inputs.count; block += input_block) {
    const Index count = std::min(input_block, inputs.count - block);
    for (Index r = 0; r < rows; r += most_rows) {
      const Index height = std::min(most_rows, rows - r);
      float* to = packed.data() + r * count;
      for (Index i = 0; i < height; ++i) {
        const float* from = x.data + (r + i) * x.stride + block;
        for (Index k = 0; k < count; ++k) to[k * height + i] = from[k];
      }
    }
    const bool accumulate = add || block > 0;
    for (Index o = 0; o < outputs.count; o += panel) {
      const float* weights = w.panel_data((outputs.first + o) / panel, inputs.first + block);
      const Index width = std::min(panel, outputs.count - o);
      for (Index r = 0; r < rows; r += most_rows) {
        const Index height = std::min(most_rows, rows - r);
        float* to = out.data + r * out.stride + o;
        const Kernel kernel_of_rows = kernels[height - 1];
        if (width == panel) {
          kernel_of_rows(packed.data() + r * count, weights, count, accumulate, to, out.stride);
        } else {
          partial_panel(kernel_of_rows, packed.data() + r * count, weights, count, accumulate, to, out.stride,
                        height, width);
        }
      }
    }
  }
}

}  // namespace engine
