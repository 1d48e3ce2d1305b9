#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/output_weights.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/attention_tiles.hpp"
#include "compresskv/kernel/finite_checks.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/logits.hpp"
#include "compresskv/kernel/packed_queries.hpp"
#include "compresskv/view/kv_view.hpp"

// How much a token's value adds to the layer's output, W_o[h] value, for each query head h that reads it.
// What is asked for is a sum over products of the value with the rows of a matrix, so it is computed as
// logits are: the rows stand for queries, the values for keys.

namespace compresskv::kernel {

namespace detail {

inline constexpr std::size_t outputs_at_once = 32;    ///< rows of the matrix whose products are in memory
inline constexpr std::size_t values_at_once = 128;    ///< their products take 16 KiB
inline constexpr std::size_t most_output_tasks = 16;  ///< each takes memory for decoded values

/// Sums over the rows of a matrix: `norms[t] = sum over i < outputs of term(row i . value t)` for the first
/// `norms.size()` values of a KV head. `read(i, out)` decodes row i. Terms are added in float64, rows
/// ascending, and the sum is rounded to float32 after every `outputs_at_once`.
template <class Kv, class O, Executor X, class Read, class Term>
void sum_over_outputs(const LayerInput<Kv, O>& in, std::size_t kv_head, std::size_t outputs, Read&& read,
                      Term&& term, Workspace& workspace, X& executor, std::span<float> norms) {
  const std::size_t head_dim = in.shape.head_dim;
  const std::size_t blocks = (norms.size() + values_at_once - 1) / values_at_once;
  const std::size_t tasks = (std::min)(blocks, most_output_tasks);
  const std::size_t buffer_size = key_buffer_size(value_kind(in.kv), head_dim);
  const std::span<float> packed =
      workspace.take(Workspace::Slot::queries, PackedQueries::size(outputs_at_once, head_dim) + head_dim);
  const std::span<float> buffers = workspace.take(Workspace::Slot::key_rows, tasks * buffer_size);
  float* const row = packed.data() + packed.size() - head_dim;
  std::fill(norms.begin(), norms.end(), 0.0F);
  for (std::size_t begin = 0; begin < outputs; begin += outputs_at_once) {
    const std::size_t count = (std::min)(outputs_at_once, outputs - begin);
    std::fill(packed.begin(), packed.end(), 0.0F);
    for (std::size_t i = 0; i < count; ++i) {
      read(begin + i, row);
      PackedQueries::pack(i, row, head_dim, packed.data());
    }
    const PackedQueries queries{.data = packed.data(), .count = count, .head_dim = head_dim};
    executor.parallel_for(tasks, [&](std::size_t task) {
      const compresskv::detail::PlainFloats plain;
      std::array<float, outputs_at_once * values_at_once> products;
      std::array<double, values_at_once> sums;
      for (std::size_t block = task; block < blocks; block += tasks) {
        const std::size_t first = block * values_at_once;
        const std::size_t values = (std::min)(values_at_once, norms.size() - first);
        logits_of_tile<Part::values>(in.kv, kv_head, first, values, queries, 1.0F,
                                     buffers.data() + task * buffer_size, products.data(), values_at_once);
        std::copy_n(norms.data() + first, values, sums.data());
        for (std::size_t i = 0; i < count; ++i) {
          const float* const product = products.data() + i * values_at_once;
          for (std::size_t t = 0; t < values; ++t) {
            sums[t] += term(static_cast<double>(product[t]));
          }
        }
        for (std::size_t t = 0; t < values; ++t) {
          norms[first + t] = static_cast<float>(sums[t]);
        }
      }
    });
  }
}

/// Throws ScoreError for a length that is not finite: values or weights are not.
inline void check_output_norms(std::size_t layer, std::size_t query_head, std::span<const float> norms) {
  if (const std::size_t bad = first_not_finite(norms); bad < norms.size()) {
    fail_not_finite(layer, query_head, bad,
                    "its value, or the layer's output weights, hold NaN or infinite elements, or their "
                    "products are beyond float32");
  }
}

/// Numbers of one head's root: a triangle.
constexpr std::size_t root_size(std::size_t head_dim) { return head_dim * (head_dim + 1) / 2; }

/// The upper triangle `R` with `R^T R = W^T W`, row after row, for `W = W_o[query_head]`: `|| R v ||` is
/// `|| W v ||`, at `head_dim / hidden` of the cost. `numbers` has room for `head_dim * (head_dim + 8)`.
inline void output_root(const OutputWeights& weights, std::size_t layer, std::size_t query_head,
                        std::span<double> numbers, std::span<float> row, std::span<float> root) {
  const compresskv::detail::PlainFloats plain;
  constexpr std::size_t together = 8;  // rows of W that are added at a time
  const std::size_t d = weights.shape().head_dim;
  double* const gram = numbers.data();  // lower triangle, of [head_dim][head_dim]
  double* const rows = gram + d * d;    // [together][head_dim]
  std::fill_n(gram, d * d, 0.0);
  for (std::size_t first = 0; first < weights.shape().hidden; first += together) {
    for (std::size_t k = 0; k < together; ++k) {
      std::fill(row.begin(), row.end(), 0.0F);
      if (first + k < weights.shape().hidden) {
        weights.read(layer, query_head, first + k, row.data());
      }
      std::copy(row.begin(), row.end(), rows + k * d);
    }
    for (std::size_t a = 0; a < d; ++a) {
      for (std::size_t k = 0; k < together; ++k) {
        const double factor = rows[k * d + a];
        for (std::size_t b = 0; b <= a; ++b) {
          gram[a * d + b] += factor * rows[k * d + b];
        }
      }
    }
  }
  // Cholesky's, in place. A column that the ones before it span is rounding alone, and has no row of its own.
  constexpr double rounding = 1e-12;
  for (std::size_t j = 0; j < d; ++j) {
    const double own = gram[j * d + j];
    double pivot = own;
    for (std::size_t k = 0; k < j; ++k) {
      pivot -= gram[j * d + k] * gram[j * d + k];
    }
    const double length = pivot > rounding * own ? std::sqrt(pivot) : 0.0;
    gram[j * d + j] = compresskv::detail::is_finite(own) ? length : own;
    for (std::size_t i = j + 1; i < d; ++i) {
      double rest = gram[i * d + j];
      for (std::size_t k = 0; k < j; ++k) {
        rest -= gram[i * d + k] * gram[j * d + k];
      }
      gram[i * d + j] = length > 0.0 ? rest / length : 0.0;
    }
  }
  for (std::size_t j = 0, at = 0; j < d; ++j) {
    for (std::size_t i = j; i < d; ++i, ++at) {
      root[at] = static_cast<float>(gram[i * d + j]);
    }
  }
}

/// Roots of all query heads of a layer, made where they are not held yet. Throws ArgumentError naming a head
/// whose weights are not finite.
template <Executor X>
std::span<const float> output_roots(const OutputWeights& weights, std::size_t layer, X& executor) {
  const std::size_t d = weights.shape().head_dim;
  const std::size_t heads = weights.shape().query_heads;
  return weights.derived(layer, [&] {
    std::vector<float> roots(heads * root_size(d));
    std::vector<float> rows(heads * d);
    std::vector<double> numbers(heads * d * (d + 8));
    executor.parallel_for(heads, [&](std::size_t head) {
      output_root(weights, layer, head, std::span(numbers).subspan(head * d * (d + 8), d * (d + 8)),
                  std::span(rows).subspan(head * d, d),
                  std::span(roots).subspan(head * root_size(d), root_size(d)));
    });
    const std::size_t bad = first_not_finite(roots);
    compresskv::detail::require(bad == roots.size(), "output weights of layer ", layer, " query head ",
                                bad / root_size(d),
                                " hold NaN or infinite elements: give the model's own, as float32, half or "
                                "bfloat16");
    return roots;
  });
}

}  // namespace detail

/// `norms[t] = || W_o[query_head] value[t] ||`, Euclidean, for the first values of the head's KV head. Throws
/// ScoreError naming a token whose length is not finite, ArgumentError where the weights are not.
///
/// Cost: head_dim^2 multiply-adds a value, and the first time in a layer hidden * head_dim^2 / 2 a query
/// head. Scratch: some 20 bytes a value, in the slots `queries`, `key_rows` and `row_sums`.
template <class Kv, class O, Executor X>
void output_lengths(const LayerInput<Kv, O>& in, const OutputWeights& weights, std::size_t query_head,
                    Workspace& workspace, X& executor, std::span<float> norms) {
  const std::size_t d = in.shape.head_dim;
  const float* const root =
      detail::output_roots(weights, in.layer, executor).data() + query_head * detail::root_size(d);
  const auto read = [&](std::size_t i, float* out) {
    const float* const row = root + detail::root_size(d) - detail::root_size(d - i);
    std::fill_n(out, i, 0.0F);
    std::copy_n(row, d - i, out + i);
  };
  detail::sum_over_outputs(
      in, query_head / in.shape.group(), d, read, [](double product) { return product * product; }, workspace,
      executor, norms);
  std::transform(norms.begin(), norms.end(), norms.begin(), [](float square) { return std::sqrt(square); });
  detail::check_output_norms(in.layer, query_head, norms);
}

/// The same by the L1 norm, the sum of absolute elements. Cost: hidden * head_dim multiply-adds a value.
template <class Kv, class O, Executor X>
void output_l1_norms(const LayerInput<Kv, O>& in, const OutputWeights& weights, std::size_t query_head,
                     Workspace& workspace, X& executor, std::span<float> norms) {
  const auto read = [&](std::size_t i, float* out) { weights.read(in.layer, query_head, i, out); };
  detail::sum_over_outputs(
      in, query_head / in.shape.group(), weights.shape().hidden, read,
      [](double product) { return std::fabs(product); }, workspace, executor, norms);
  detail::check_output_norms(in.layer, query_head, norms);
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
