// expect: the queries would die with this temporary: keep the RecentQueries in a variable
#include <compresskv/compresskv.hpp>

namespace ckv = compresskv;

const ckv::QueryWindow<float> queries = ckv::RecentQueries<float>{ckv::QueryShape{}}.view();
