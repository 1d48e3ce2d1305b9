#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "error.hpp"

namespace engine {

TokenId greedy(std::span<const float> logits) {
  if (logits.empty()) throw Error("there are no logits to choose a token from");
  std::size_t best = logits.size();
  for (std::size_t token = 0; token < logits.size(); ++token) {
    const float logit = logits[token];
    if (std::isnan(logit) || logit == std::numeric_limits<float>::infinity()) {
      throw Error("the logit of token " + std::to_string(token) + " is " +
                  (std::isnan(logit) ? "NaN" : "+inf") +
                  "; logits must be finite, or -inf for tokens that are masked");
    }
    if (std::isinf(logit)) continue;
    if (best == logits.size() || logit > logits[best]) best = token;
  }
  if (best == logits.size()) {
    throw Error("all " + std::to_string(logits.size()) +
                " logits are -inf; at least one token must be allowed");
  }
  return static_cast<TokenId>(best);
}

Sampler::Sampler(SamplerOptions options) : options_(options), generator_(options.seed) {
  if (!std::isfinite(options.temperature) || options.temperature < 0.0F) {
    throw Error("temperature is " + std::to_string(options.temperature) +
                "; it must be finite and at least 0 (0 takes the likeliest token)");
  }
  if (!(options.top_p > 0.0F && options.top_p <= 1.0F)) {
    throw Error("top_p is " + std::to_string(options.top_p) +
                "; it must be above 0 and at most 1 (1 leaves all in)");
  }
}

TokenId Sampler::next(std::span<const float> logits) {
  const TokenId likeliest = greedy(logits);
  if (options_.temperature == 0.0F) return likeliest;

  const double highest = logits[static_cast<std::size_t>(likeliest)];
  shares_.resize(logits.size());
  std::transform(logits.begin(), logits.end(), shares_.begin(),
                 [&](float logit) { return std::exp((logit - highest) / options_.temperature); });
  order_.resize(logits.size());
  std::iota(order_.begin(), order_.end(), std::size_t{0});

  double total = std::accumulate(shares_.begin(), shares_.end(), 0.0);
  if (options_.top_p < 1.0F) {
    std::sort(order_.begin(), order_.end(), [&](std::size_t a, std::size_t b) {
      return shares_[a] != shares_[b] ? shares_[a] > shares_[b] : a < b;
    });
    const double wanted = total * static_cast<double>(options_.top_p);
    total = 0.0;
    std::size_t kept = 0;
    while (kept < order_.size() && total < wanted) total += shares_[order_[kept++]];
    order_.resize(std::max<std::size_t>(kept, 1));
  }

  const double target = uniform() * total;
  double passed = 0.0;
  std::size_t last = static_cast<std::size_t>(likeliest);
  for (const std::size_t token : order_) {
    if (shares_[token] == 0.0) continue;
    last = token;
    passed += shares_[token];
    if (passed > target) break;
  }
  return static_cast<TokenId>(
      last);  // the last token with a share, should rounding keep `passed` at the target
}

double Sampler::uniform() {
  constexpr double step = 0x1p-53;
  return static_cast<double>(generator_() >> 11U) * step;
}

}  // namespace engine
