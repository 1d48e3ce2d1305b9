// Scorer: what models it, and what does not for want of one member (the table in score/scorer.hpp).

#include <gtest/gtest.h>

#include <compresskv/score/grouped_retrieval.hpp>
#include <compresskv/score/scorer.hpp>
#include <compresskv/score/semantic_retrieval.hpp>
#include <compresskv/score/streaming_llm.hpp>
#include <memory>

namespace compresskv::score {
namespace {

static_assert(Scorer<SemanticRetrieval> && Scorer<StreamingLlm>);
static_assert(SemanticRetrieval::granularity == Granularity::layer &&
              SemanticRetrieval::needs == Needs::window_attention &&
              SemanticRetrieval::reach == Reach::own_layer);
static_assert(StreamingLlm::needs == Needs::nothing);
static_assert(Scorer<GroupedRetrieval> && GroupedRetrieval::granularity == Granularity::kv_head);

struct Own {
  static constexpr Granularity granularity = Granularity::kv_head;
  static constexpr Needs needs = Needs::keys;
  static constexpr Reach reach = Reach::all_layers;
  std::size_t window() const { return 1; }
  void validate(const ModelShape&) const {}
};
static_assert(Scorer<Own>);

struct NoGranularity : Own {
  void granularity() const;
};
struct NoNeeds : Own {
  void needs() const;
};
struct NoReach : Own {
  void reach() const;
};
struct NoWindow : Own {
  void window() const = delete;
};
struct NegativeWindow : Own {
  int window() const { return -1; }
};
struct NoValidate : Own {
  void validate() const;
};
struct NotCopyable : Own {
  std::unique_ptr<int> owner;
};
static_assert(!Scorer<NoGranularity> && !Scorer<NoNeeds> && !Scorer<NoReach> && !Scorer<NoWindow>);
static_assert(!Scorer<NegativeWindow> && !Scorer<NoValidate> && !Scorer<NotCopyable>);

TEST(ScorerRequirements, AreCheckedWhenThisFileCompiles) {}

}  // namespace
}  // namespace compresskv::score
