// first: this selector cannot use scores of this scorer's granularity
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::kv_head, ckv::Needs::nothing, ckv::Reach::own_layer>;

const ckv::Plan plan{shape, CaseScorer{}, ckv::select::SharedTopK{}, uniform};
