// first: a selector comes third
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, uniform, ckv::select::SharedTopK{}};
