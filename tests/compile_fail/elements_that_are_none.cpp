// expect: Stored
#include <compresskv/compresskv.hpp>

using View = compresskv::StridedKv<double>;

View* view;
