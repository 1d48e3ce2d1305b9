#include "calibration_results.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <numeric>
#include <random>
#include <set>
#include <utility>

#include "engine/error.hpp"

namespace ckv {
namespace {

namespace calibrate = compresskv::calibrate;

constexpr std::size_t top = 4;  // heads a layer that must stay the same

std::vector<double> means_of(const compresskv::HeadScores& scores) {
  std::vector<double> means;
  for (std::size_t layer = 0; layer < scores.layers(); ++layer) {
    for (std::size_t head = 0; head < scores.heads(); ++head) {
      means.push_back(scores.mean(layer, head));
    }
  }
  return means;
}

/// Each value's rank, equal ones the mean of theirs.
std::vector<double> ranks_of(std::span<const double> values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return values[a] < values[b]; });
  std::vector<double> ranks(values.size());
  for (std::size_t first = 0; first < order.size();) {
    std::size_t last = first;
    while (last < order.size() && values[order[last]] == values[order[first]]) {
      ++last;
    }
    for (std::size_t i = first; i < last; ++i) {
      ranks[order[i]] = 0.5 * static_cast<double>(first + last - 1);
    }
    first = last;
  }
  return ranks;
}

/// The same order everywhere: no library's distribution.
template <class T>
void shuffle(std::vector<T>& values, std::uint64_t seed) {
  std::mt19937_64 generator{seed};
  for (std::size_t left = values.size(); left > 1; --left) {
    std::swap(values[left - 1], values[generator() % left]);
  }
}

}  // namespace

Json heads_key(std::size_t run) { return {{"kind", "heads"}, {"run", run}}; }

Json errors_key(std::size_t rows, const std::string& data_set, std::size_t run) {
  return {{"kind", "errors"}, {"rows", rows}, {"data_set", data_set}, {"run", run}};
}

Json ablation_key(std::size_t length, const HeadMask& mask, std::size_t run) {
  return {{"kind", "ablation"},           {"length", length}, {"heads", mask.heads}, {"draw", mask.draw},
          {"masked", mask.masked.size()}, {"run", run}};
}

Json key_of(const Json& record) {
  static const std::map<std::string, std::vector<std::string>> names = {
      {"heads", {"run"}},
      {"errors", {"rows", "data_set", "run"}},
      {"ablation", {"length", "heads", "draw", "masked", "run"}}};
  Json key = {{"kind", record.at("kind")}};
  const auto found = names.find(key.at("kind").get<std::string>());
  if (found == names.end()) {
    throw engine::Error(fmt::format("its kind is {}", key.at("kind").dump()));
  }
  for (const std::string& name : found->second) {
    key[name] = record.at(name);
  }
  return key;
}

template <class Read>
auto CalibrationRecords::checked(const Read& read) const {
  try {
    return read();
  } catch (const std::exception& error) {
    throw engine::Error(
        fmt::format("'{}' holds a record that is none of this calibration: {}; give another folder",
                    path_.string(), error.what()));
  }
}

CalibrationRecords::CalibrationRecords(const std::filesystem::path& path, const Json& header)
    : path_(path), file_(path, header, [](const Json& record) { return key_of(record).dump(); }) {
  for (const Json& record : file_.records()) {
    records_.emplace(key_of(record).dump(), record);
  }
}

void CalibrationRecords::add(const Json& record) {
  file_.add(record);
  records_.insert_or_assign(key_of(record).dump(), record);
}

calibrate::HeadScoreAccumulator CalibrationRecords::heads(std::size_t runs,
                                                          const compresskv::ModelShape& shape) const {
  return checked([&] {
    calibrate::HeadScoreAccumulator scores{shape.layers, shape.query_heads};
    for (std::size_t run = 0; run < runs; ++run) {
      const Json& record = at(heads_key(run));
      scores.add_run({.run = run,
                      .counted = record.at("counted"),
                      .once_per_occurrence = record.at("once_per_occurrence"),
                      .once_per_step = record.at("once_per_step"),
                      .classic = record.at("classic")});
    }
    return scores;
  });
}

calibrate::EvictionErrorAccumulator CalibrationRecords::errors(std::span<const ErrorPrompt> prompts,
                                                               std::size_t rows,
                                                               const compresskv::ModelShape& shape) const {
  return checked([&] {
    calibrate::EvictionErrorAccumulator errors{shape.layers};
    for (const ErrorPrompt& prompt : prompts) {
      const Json& record = at(errors_key(rows, prompt.data_set, prompt.run));
      if (record.at("steps") > 0) {
        errors.add_run({.data_set = prompt.data_set,
                        .run = prompt.run,
                        .steps = record.at("steps"),
                        .errors = record.at("errors")});
      }
    }
    return errors;
  });
}

bool CalibrationRecords::right(std::size_t length, const HeadMask& mask, std::size_t run) const {
  return checked([&] { return at(ablation_key(length, mask, run)).at("right").get<bool>(); });
}

std::vector<engine::HeadIndex> best_heads(const compresskv::HeadScores& scores) {
  std::vector<engine::HeadIndex> heads;
  for (std::size_t layer = 0; layer < scores.layers(); ++layer) {
    for (std::size_t head = 0; head < scores.heads(); ++head) {
      heads.push_back({.layer = static_cast<int>(layer), .head = static_cast<int>(head)});
    }
  }
  const std::vector<double> means = means_of(scores);
  const auto mean = [&](const engine::HeadIndex& at) {
    return means[static_cast<std::size_t>(at.layer) * scores.heads() + static_cast<std::size_t>(at.head)];
  };
  std::stable_sort(heads.begin(), heads.end(),
                   [&](const auto& a, const auto& b) { return mean(a) > mean(b); });
  return heads;
}

double top_overlap(const compresskv::HeadRanking& a, const compresskv::HeadRanking& b, std::size_t count) {
  double sum = 0.0;
  for (std::size_t layer = 0; layer < a.layers(); ++layer) {
    const auto heads = a.heads(layer).first(std::min(count, a.heads(layer).size()));
    const auto others = b.heads(layer).first(heads.size());
    const auto both = std::count_if(heads.begin(), heads.end(), [&](std::uint32_t head) {
      return std::find(others.begin(), others.end(), head) != others.end();
    });
    sum += static_cast<double>(both) / static_cast<double>(heads.size());
  }
  return sum / static_cast<double>(a.layers());
}

double rank_correlation(const compresskv::HeadScores& a, const compresskv::HeadScores& b) {
  const std::vector<double> x = ranks_of(means_of(a));
  const std::vector<double> y = ranks_of(means_of(b));
  const double mean = 0.5 * static_cast<double>(x.size() - 1);
  double xy = 0.0;
  double xx = 0.0;
  double yy = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    xy += (x[i] - mean) * (y[i] - mean);
    xx += (x[i] - mean) * (x[i] - mean);
    yy += (y[i] - mean) * (y[i] - mean);
  }
  return xx > 0.0 && yy > 0.0 ? xy / std::sqrt(xx * yy) : 0.0;
}

Json stability_json(const calibrate::HeadScoreAccumulator& scores, calibrate::HeadScoreKind kind) {
  std::vector<std::size_t> counted;
  for (const auto& [number, run] : scores.runs()) {
    if (run.counted) {
      counted.push_back(number);
    }
  }
  const auto even = [](std::size_t run) { return run % 2 == 0; };
  const auto first = static_cast<std::size_t>(std::count_if(counted.begin(), counted.end(), even));
  if (first == 0 || first == counted.size()) {
    return nullptr;
  }
  const compresskv::HeadScores a = scores.scores_of(even, kind);
  const compresskv::HeadScores b = scores.scores_of([&](std::size_t run) { return !even(run); }, kind);
  Json out;
  out["halves"] = {{"prompts", {first, counted.size() - first}},
                   {"top4_overlap", top_overlap(a.ranking(), b.ranking(), top)},
                   {"rank_correlation", rank_correlation(a, b)}};
  shuffle(counted, 0);
  const compresskv::HeadRanking whole = scores.scores(kind).ranking();
  out["by_prompts"] = Json::array();
  for (std::size_t prompts = 1; prompts < counted.size(); prompts *= 2) {
    const std::set<std::size_t> some(counted.begin(), counted.begin() + static_cast<std::ptrdiff_t>(prompts));
    const auto ranking =
        scores.scores_of([&](std::size_t run) { return some.contains(run); }, kind).ranking();
    out["by_prompts"].push_back({{"prompts", prompts}, {"top4_overlap", top_overlap(ranking, whole, top)}});
  }
  return out;
}

std::vector<HeadMask> head_masks(const compresskv::HeadScores& srh, const compresskv::HeadScores& classic,
                                 std::span<const std::size_t> counts, std::size_t draws) {
  std::vector<HeadMask> masks = {{.heads = "srh"}};
  const auto add = [&](const char* heads, std::size_t draw, std::span<const engine::HeadIndex> ranked,
                       std::size_t count) {
    const auto best = ranked.first(count);
    masks.push_back({.heads = heads, .draw = draw, .masked = {best.begin(), best.end()}});
  };
  const std::vector<engine::HeadIndex> by_srh = best_heads(srh);
  const std::vector<engine::HeadIndex> by_classic = best_heads(classic);
  for (const std::size_t count : counts) {
    add("srh", 0, by_srh, count);
    add("classic", 0, by_classic, count);
    for (std::size_t draw = 0; draw < draws; ++draw) {
      std::vector<engine::HeadIndex> any = by_srh;
      std::sort(any.begin(), any.end());
      shuffle(any, draw);
      add("random", draw, any, count);
    }
  }
  return masks;
}

Json ablation_json(const CalibrationRecords& records, std::size_t length, std::span<const HeadMask> masks,
                   std::span<const std::size_t> runs) {
  Json out = Json::array();
  for (const char* heads : {"srh", "classic", "random"}) {
    std::map<std::size_t, std::pair<std::size_t, std::size_t>> by_count;  // draws, right answers
    for (const HeadMask& mask : masks) {
      if (mask.heads == heads || mask.masked.empty()) {
        auto& [draws, right] = by_count[mask.masked.size()];
        ++draws;
        right += static_cast<std::size_t>(std::count_if(
            runs.begin(), runs.end(), [&](std::size_t run) { return records.right(length, mask, run); }));
      }
    }
    for (const auto& [masked, sums] : by_count) {
      Json row = {{"heads", heads}, {"masked", masked}, {"prompts", runs.size()}};
      if (heads == std::string("random")) {
        row["draws"] = sums.first;
      }
      row["right"] = static_cast<double>(sums.second) / static_cast<double>(sums.first * runs.size());
      out.push_back(std::move(row));
    }
  }
  return out;
}

}  // namespace ckv
