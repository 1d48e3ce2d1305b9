// first: this selector cannot use scores of this scorer's granularity
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::HeadMean{ckv::score::SnapKv{}}, ckv::select::GroupedTopK{}, uniform};
