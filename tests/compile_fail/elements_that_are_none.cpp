// expect: Element
#include <compresskv/compresskv.hpp>

using View = compresskv::StridedKv<double>;

View* view;
