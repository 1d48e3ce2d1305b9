// first: a scorer comes second
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::select::SharedTopK{}, ckv::score::Tova{}, uniform};
