// What the library offers models the concepts it is used by. Here and not in the headers, where every program
// would pay.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <compresskv/core/any_executor.hpp>
#include <compresskv/core/policy.hpp>
#include <compresskv/sequence/cross_layer.hpp>
#include <compresskv/view/any_kv.hpp>
#include <compresskv/view/any_observation.hpp>

namespace compresskv {
namespace {

static_assert(score::Scorer<score::Cake> && score::Scorer<score::Carried> &&
              score::Scorer<score::GroupedRetrieval>);
static_assert(score::Scorer<score::ChunkKv<score::SnapKv>> && score::Scorer<score::Cur> &&
              score::Scorer<score::HeadMean<score::SnapKv>> && score::Scorer<score::LagKv>);
static_assert(score::Scorer<score::H2O> && score::Scorer<score::KeyDiff> && score::Scorer<score::Knorm>);
static_assert(score::Scorer<score::ExpectedAttention> && score::Scorer<score::QFilter> &&
              score::Scorer<score::TriAttention>);
static_assert(score::Scorer<score::ModelWide> && score::Scorer<score::Random> &&
              score::Scorer<score::SemanticRetrieval>);
static_assert(score::Scorer<score::SnapKv> && score::Scorer<score::StreamingLlm> &&
              score::Scorer<score::Tova>);

static_assert(select::Selector<select::Adaptive> && select::Selector<select::GroupedTopK> &&
              select::Selector<select::SharedTopK>);

static_assert(budget::Allocator<budget::Cake> && budget::Allocator<budget::ErrorAware> &&
              budget::Allocator<budget::Pyramid> && budget::Allocator<budget::Uniform>);

static_assert(KvView<AnyKv> && Executor<AnyExecutor> && sequence::CrossLayer<sequence::OwnLayer>);
static_assert(QueryObservation<AnyQueries> && AttentionObservation<AnyAttention> && SumsObservation<AnySums>);

}  // namespace
}  // namespace compresskv
