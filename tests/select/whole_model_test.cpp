// One budget for all layers and KV heads, held against a sort of all their scores.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/select/whole_model.hpp>
#include <cstdint>
#include <numeric>
#include <span>
#include <tuple>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::select {
namespace {

using Kept = std::vector<std::vector<std::vector<std::uint32_t>>>;  // [layer][head][row]
using Model = std::vector<std::vector<std::vector<Score16>>>;       // the same, scores

Kept cut_whole(const Model& model, std::size_t window, std::size_t room) {
  WholeModel::Cut cut = WholeModel::cut(room, [&](auto&& visit) {
    for (const auto& layer : model) {
      for (const auto& head : layer) {
        visit(std::span<const Score16>(head));
      }
    }
  });
  Kept kept;
  Workspace workspace;
  Selection selection;
  for (const auto& layer : model) {
    const std::vector<std::span<const Score16>> rows(layer.begin(), layer.end());
    const std::vector<std::size_t> windows(layer.size(), window);
    WholeModel::select(rows, windows, cut, workspace, selection);
    kept.emplace_back();
    for (std::size_t head = 0; head < layer.size(); ++head) {
      kept.back().emplace_back(selection.rows(head).begin(), selection.rows(head).end());
    }
  }
  return kept;
}

/// All of them sorted: the higher score, then the lower layer, row and head.
Kept sort_whole(const Model& model, std::size_t window, std::size_t room) {
  std::vector<std::tuple<int, std::size_t, std::size_t, std::size_t>> all;
  Kept kept;
  for (std::size_t layer = 0; layer < model.size(); ++layer) {
    kept.emplace_back(model[layer].size());
    for (std::size_t head = 0; head < model[layer].size(); ++head) {
      for (std::size_t row = 0; row < model[layer][head].size(); ++row) {
        all.emplace_back(-model[layer][head][row], layer, row, head);
      }
    }
  }
  std::sort(all.begin(), all.end());
  all.resize(std::min(room, all.size()));
  for (const auto& [score, layer, row, head] : all) {
    kept[layer][head].push_back(static_cast<std::uint32_t>(row));
  }
  for (std::size_t layer = 0; layer < model.size(); ++layer) {
    for (std::size_t head = 0; head < model[layer].size(); ++head) {
      auto& rows = kept[layer][head];
      std::sort(rows.begin(), rows.end());
      for (std::size_t i = 0; i < window; ++i) {
        rows.push_back(static_cast<std::uint32_t>(model[layer][head].size() + i));
      }
    }
  }
  return kept;
}

TEST(WholeModel, KeepsTheBestOfAllLayersAndHeads) {
  reference::Random random(7);
  for (int i = 0; i < 2000; ++i) {
    // Few values make many ties, all of them few.
    const std::vector<std::size_t> spreads{1, 3, 300, 31745};
    const std::size_t spread = random.pick(spreads);
    Model model(random.between(1, 5));
    const std::size_t heads = random.between(1, 4);
    std::size_t total = 0;
    for (auto& layer : model) {
      layer.resize(heads);
      for (auto& head : layer) {
        head.resize(random.below(40));
        total += head.size();
        for (Score16& score : head) {
          score = random.below(20) == 0 ? certain16 : static_cast<Score16>(random.below(spread));
        }
      }
    }
    const std::size_t window = random.between(0, 3);
    for (const std::size_t room : {std::size_t{0}, random.between(0, total), total, total + 3}) {
      SCOPED_TRACE(testing::Message() << "case " << i << " room " << room << " of " << total);
      ASSERT_EQ(cut_whole(model, window, room), sort_whole(model, window, room));
    }
  }
}

}  // namespace
}  // namespace compresskv::select
