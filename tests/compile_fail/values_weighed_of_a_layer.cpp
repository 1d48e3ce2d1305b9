// first: this scorer gives all KV heads of a layer one row of scores: CriticalKv weighs the values of each
#include "scorer.hpp"

void weigh(const ckv::OutputWeights& weights) {
  const ckv::score::CriticalKv critical{ckv::score::StreamingLlm{}, weights};
}
