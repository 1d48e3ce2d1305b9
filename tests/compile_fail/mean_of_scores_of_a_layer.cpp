// first: this scorer gives all KV heads of a layer one row of scores already
#include "scorer.hpp"

const ckv::score::HeadMean mean{ckv::score::StreamingLlm{}};
