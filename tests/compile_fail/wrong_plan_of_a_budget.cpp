// first: an allocator comes fourth, made from the budget
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, ckv::Budget::tokens_per_layer(16)};
