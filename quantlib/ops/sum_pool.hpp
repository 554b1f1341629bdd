// SumPool: a window stage whose outside is 0, and a sum; or a sum over the whole map.
#pragma once
#include "ql_pool.hpp"
#include "ql_window.hpp"

namespace ql {



}  // namespace ql
