// KvView and Observation: what models them, and what does not for want of one member. Each requirement of the
// tables in view/kv_view.hpp and view/observation.hpp is a line here.

#include <gtest/gtest.h>

#include <compresskv/view/any_observation.hpp>
#include <compresskv/view/attention_matrix.hpp>
#include <compresskv/view/hidden_states.hpp>
#include <compresskv/view/int8_kv.hpp>
#include <compresskv/view/kv_view.hpp>
#include <compresskv/view/paged_kv.hpp>
#include <compresskv/view/query_window.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <limits>
#include <memory>
#include <span>

#include "reference/scattered_kv.hpp"

namespace compresskv {
namespace {

using Half = half;
using Brain = bfloat16;

// ---- KvView ----

static_assert(KvView<StridedKv<float>> && KvView<StridedKv<Half>> && KvView<StridedKv<Brain>>);
static_assert(KvView<StridedKv<float, Half>> && KvView<StridedKv<const float>>);
static_assert(KvView<reference::ScatteredKv<float>>);
static_assert(KvView<StridedKv<BlockQ8_0>> && KvView<StridedKv<BlockQ4_0, Half>> && KvView<Int8Kv>);
static_assert(KvView<PagedKv<float>> && KvView<PagedKv<BlockQ4_0, Brain>>);

/// All that a view needs, and nothing from the library but `Run`.
struct Kv {
  using key_element = float;
  using value_element = Half;
  unsigned kv_heads() const { return 1; }
  unsigned head_dim() const { return 1; }
  unsigned rows(std::size_t) const { return 1; }
  unsigned run_count(std::size_t) const { return 1; }
  Run<float> key_run(std::size_t, std::size_t) const { return {}; }
  Run<Half> value_run(std::size_t, std::size_t) const { return {}; }
};
static_assert(KvView<Kv>, "sizes may be of any unsigned type");

struct DoubleKeys : Kv {
  using key_element = double;
  Run<double> key_run(std::size_t, std::size_t) const { return {}; }
};
struct IntegerValues : Kv {
  using value_element = int;
  Run<int> value_run(std::size_t, std::size_t) const { return {}; }
};
struct NoKvHeads : Kv {
  void kv_heads() const = delete;
};
struct NoHeadDim : Kv {
  void head_dim() const = delete;
};
struct NoRows : Kv {
  void rows() const;
};
struct NoRunCount : Kv {
  void run_count() const;
};
struct NoKeyRun : Kv {
  void key_run() const;
};
struct NoValueRun : Kv {
  void value_run() const;
};
struct RunsOfOtherElements : Kv {
  Run<Half> key_run(std::size_t, std::size_t) const { return {}; }
};
struct RowsNotConst : Kv {
  std::size_t rows(std::size_t) { return 1; }
};
struct NotCopyable : Kv {
  std::unique_ptr<int> owner;
};
static_assert(!KvView<DoubleKeys> && !KvView<IntegerValues>);
static_assert(!KvView<NoKvHeads> && !KvView<NoHeadDim> && !KvView<NoRows> && !KvView<NoRunCount>);
static_assert(!KvView<NoKeyRun> && !KvView<NoValueRun> && !KvView<RunsOfOtherElements>);
static_assert(!KvView<RowsNotConst> && !KvView<NotCopyable> && !KvView<int>);

// ---- Observation by queries ----

static_assert(QueryObservation<QueryWindow<float>> && QueryObservation<QueryWindow<Half>>);
static_assert(!AttentionObservation<QueryWindow<float>>);

struct Queries {
  using element = Brain;
  unsigned query_heads() const { return 1; }
  unsigned queries() const { return 1; }
  unsigned head_dim() const { return 1; }
  double scale() const { return 1.0; }
  Run<const Brain> query_run(std::size_t) const { return {}; }
};
static_assert(QueryObservation<Queries> && Observation<Queries>);

struct DoubleQueries : Queries {
  using element = double;
  Run<const double> query_run(std::size_t) const { return {}; }
};
struct NoQueryHeads : Queries {
  void query_heads() const = delete;
};
struct NoQueries : Queries {
  void queries() const = delete;
};
struct NoQueryDim : Queries {
  void head_dim() const = delete;
};
struct NoScale : Queries {
  void scale() const = delete;
};
struct NoQueryRun : Queries {
  void query_run() const;
};
struct WritableQueries : Queries {
  Run<Brain> query_run(std::size_t) const { return {}; }
};
static_assert(!Observation<DoubleQueries> && !Observation<NoQueryHeads> && !Observation<NoQueries>);
static_assert(!Observation<NoQueryDim> && !Observation<NoScale> && !Observation<NoQueryRun>);
static_assert(!Observation<WritableQueries>, "the queries are only read, and say so");

// ---- Observation by attention ----

static_assert(AttentionObservation<AttentionMatrix<float>> && AttentionObservation<AttentionMatrix<Brain>>);
static_assert(!QueryObservation<AttentionMatrix<float>>);

struct Attention {
  using element = float;
  unsigned query_heads() const { return 1; }
  unsigned queries() const { return 1; }
  unsigned tokens() const { return 1; }
  Run<const float> attention_run(std::size_t) const { return {}; }
};
static_assert(AttentionObservation<Attention> && Observation<Attention>);

struct NoAttentionHeads : Attention {
  void query_heads() const = delete;
};
struct NoAttentionQueries : Attention {
  void queries() const = delete;
};
struct NoTokens : Attention {
  void tokens() const = delete;
};
struct NoAttentionRun : Attention {
  void attention_run() const;
};
static_assert(!Observation<NoAttentionHeads> && !Observation<NoAttentionQueries> && !Observation<NoTokens>);
static_assert(!Observation<NoAttentionRun> && !Observation<Kv> && !KvView<Queries>);

// ---- Observation by sums ----

static_assert(SumsObservation<AttentionSums> && KeylessObservation<AttentionSums>);
static_assert(KeylessObservation<AttentionMatrix<float>> && !KeylessObservation<QueryWindow<float>>);

struct Sums {
  unsigned query_heads() const { return 1; }
  unsigned queries() const { return 1; }
  unsigned tokens() const { return 1; }
  std::span<const float> sums(std::size_t) const { return {}; }
};
static_assert(SumsObservation<Sums> && Observation<Sums> && !AttentionObservation<Sums>);

struct NoSumHeads : Sums {
  void query_heads() const = delete;
};
struct NoSumQueries : Sums {
  void queries() const = delete;
};
struct NoSumTokens : Sums {
  void tokens() const = delete;
};
struct HalfSums : Sums {
  std::span<const Half> sums(std::size_t) const { return {}; }
};
static_assert(!Observation<NoSumHeads> && !Observation<NoSumQueries> && !Observation<NoSumTokens>);
static_assert(!Observation<HalfSums>);

// ---- Observation by hidden states ----

static_assert(HiddenObservation<HiddenStates<float>> && HiddenObservation<HiddenStates<Half>>);
static_assert(HiddenObservation<AnyHiddenStates> && !Observation<HiddenStates<float>>);
static_assert(!HiddenObservation<QueryWindow<float>> && !HiddenObservation<AttentionMatrix<float>>);

struct States {
  using element = float;
  unsigned tokens() const { return 1; }
  unsigned hidden_size() const { return 1; }
  Run<const float> hidden_run() const { return {}; }
};
static_assert(HiddenObservation<States> && !Observation<States>);

struct NoStateTokens : States {
  void tokens() const = delete;
};
struct NoHiddenSize : States {
  void hidden_size() const = delete;
};
struct NoHiddenRun : States {
  void hidden_run() const = delete;
};
struct WritableStates : States {
  Run<float> hidden_run() const { return {}; }
};
struct DoubleStates : States {
  using element = double;
  Run<const double> hidden_run() const { return {}; }
};
static_assert(!HiddenObservation<NoStateTokens> && !HiddenObservation<NoHiddenSize>);
static_assert(!HiddenObservation<NoHiddenRun> && !HiddenObservation<WritableStates>);
static_assert(!HiddenObservation<DoubleStates>);

// ---- optional members of an observation by queries ----

struct CappedQueries : Queries {
  float soft_cap() const { return 30.0F; }
  std::size_t sliding_window() const { return 7; }
  float sink_logit(std::size_t head) const { return static_cast<float>(head); }
};
static_assert(QueryObservation<CappedQueries>);

TEST(ViewRequirements, WhatAnObservationDoesNotSayIsNone) {
  EXPECT_EQ(detail::soft_cap(Queries{}), 0.0F);
  EXPECT_EQ(detail::sliding_window(Queries{}), 0U);
  EXPECT_EQ(detail::sink_logit(Queries{}, 0), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(detail::soft_cap(CappedQueries{}), 30.0F);
  EXPECT_EQ(detail::sliding_window(CappedQueries{}), 7U);
  EXPECT_EQ(detail::sink_logit(CappedQueries{}, 3), 3.0F);
}

// ---- layouts ----

static_assert(layout::Layout<layout::HeadTokenDim> && layout::Layout<layout::SplitDim> &&
              layout::Layout<layout::Strides>);
static_assert(!layout::Layout<int> && !layout::Layout<layout::Extents>);

TEST(ViewRequirements, AreCheckedWhenThisFileCompiles) {}

}  // namespace
}  // namespace compresskv
