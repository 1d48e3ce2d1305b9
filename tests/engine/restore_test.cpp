// A sequence whose rows were written down and taken up by another one.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "engine/error.hpp"
#include "engine/sequence.hpp"
#include "engine/sequence_checks.hpp"
#include "engine/tiny_model.hpp"
#include "message_of.hpp"

namespace engine::test {
namespace {

using compresskv::test::message_of;

/// Copies of a sequence's rows, in caches of their own.
std::vector<LayerCache> rows_of(const Sequence& sequence, const ModelConfig& config) {
  std::vector<LayerCache> caches;
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerCache& from = sequence.cache(layer);
    LayerCache& to = caches.emplace_back(from.type(), from.kv_heads(), from.head_dim());
    CacheMeter meter;
    to.resize(from.rows(), meter);
    EXPECT_EQ(meter.current, to.bytes());
    with_kv_type(from.type(), [&]<typename T>(T*) {
      for (int head = 0; head < from.kv_heads(); ++head) {
        const std::size_t count = from.rows(head) * static_cast<std::size_t>(from.head_dim());
        EXPECT_EQ(to.rows(head), from.rows(head));
        std::copy_n(from.keys<T>(head), count, to.keys<T>(head));
        std::copy_n(from.values<T>(head), count, to.values<T>(head));
      }
    });
  }
  return caches;
}

TEST(Restore, GoesOnWithTheSameBits) {
  const TinyModel tiny{{.layers = 3}};
  const Model model = tiny.model();
  const auto tokens = random_tokens(60, tiny.shape.vocabulary, 1);
  for (const KvType type : {KvType::f32, KvType::f16, KvType::bf16}) {
    Sequence sequence{model, {.kv_type = type}};
    sequence.prefill(std::span(tokens).first(40), {.window = 4,
                                                   .on_layer =
                                                       [](LayerView& view) {
                                                         std::vector<std::vector<std::size_t>> kept(2);
                                                         for (std::size_t row = 0; row < 40; ++row) {
                                                           if (row % 3 == 0) kept[0].push_back(row);
                                                           if (view.layer != 1 && row % 2 == 0)
                                                             kept[1].push_back(row);
                                                         }
                                                         if (view.layer == 1) kept[1] = {7, 39};
                                                         keep_rows(view, kept);
                                                       },
                                                   .on_logits = {}});
    Sequence restored{model, {.kv_type = type}};
    restored.prefill(std::span(tokens).last(5));  // something else was there before
    restored.restore(rows_of(sequence, model.config()), 40);
    EXPECT_EQ(restored.next_position(), 40U);
    EXPECT_EQ(restored.cache_bytes(), sequence.cache_bytes());
    EXPECT_TRUE(restored.logits().empty());
    for (Sequence* one : {&sequence, &restored}) {
      one->prefill(std::span(tokens).subspan(40, 12));
      one->decode(tokens[52], 52);
    }
    EXPECT_EQ(copy(restored.logits()), copy(sequence.logits()));
    EXPECT_NE(message_of<Error>([&] { restored.truncate(39); }), message_of<Error>([&] {}))
        << "before the rows";
    for (Sequence* one : {&sequence, &restored}) {
      one->truncate(45);
      one->decode(tokens[53], 45);
    }
    EXPECT_EQ(copy(restored.logits()), copy(sequence.logits()));
  }
}

TEST(Restore, RefusesCachesOfAnotherKind) {
  const TinyModel tiny{{.layers = 2}};
  const Model model = tiny.model();
  const ModelConfig& c = model.config();
  const auto tokens = random_tokens(9, tiny.shape.vocabulary, 1);
  Sequence sequence{model};
  sequence.prefill(tokens);
  const auto expected = copy(sequence.logits());
  const auto refused = [&](std::vector<LayerCache> caches, std::size_t position) {
    const std::string message = message_of<Error>([&] { sequence.restore(std::move(caches), position); });
    EXPECT_EQ(sequence.next_position(), 9U) << "it is as it was";
    EXPECT_EQ(copy(sequence.logits()), expected);
    return message;
  };
  const auto caches = [&](KvType type, int heads, int dim) {
    return std::vector<LayerCache>(2, LayerCache{type, heads, dim});
  };
  EXPECT_EQ(refused({}, 5), "restore: there are 0 caches for 2 layers; give one each");
  EXPECT_EQ(refused(caches(KvType::f16, c.kv_heads, c.head_dim), 5),
            "restore: the cache of layer 0 has 2 KV heads of 8 elements of f16, the sequence 2 of 8 of f32");
  EXPECT_NE(refused(caches(KvType::f32, c.kv_heads + 1, c.head_dim), 5).find("3 KV heads"),
            std::string::npos);
  EXPECT_NE(refused(caches(KvType::f32, c.kv_heads, 4), 5).find("of 4 elements"), std::string::npos);
  for (const std::size_t position : {std::size_t{0}, static_cast<std::size_t>(c.context) + 1}) {
    EXPECT_EQ(refused(caches(KvType::f32, c.kv_heads, c.head_dim), position),
              "restore: next_position is " + std::to_string(position) +
                  ", must be from 1 to the model's context of 400");
  }
  LayerCache cache{KvType::f32, 2, 8};
  CacheMeter meter;
  EXPECT_EQ(message_of<Error>([&] { cache.resize(std::vector<std::size_t>{1}, meter); }),
            "1 lengths for 2 KV heads; give one each");
}

}  // namespace
}  // namespace engine::test
