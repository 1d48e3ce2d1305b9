// first: a selector that chooses from the whole model at once needs scores that are held until then
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::SnapKv{}, ckv::select::WholeModel{}, uniform};
