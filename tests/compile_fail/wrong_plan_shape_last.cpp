// first: the ModelShape comes first
#include "scorer.hpp"

const ckv::Plan plan{ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform, shape};
