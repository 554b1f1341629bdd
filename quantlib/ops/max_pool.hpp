// MaxPool: a window stage whose outside is the least code, and a maximum.
#pragma once
#include "ql_pool.hpp"
#include "ql_window.hpp"

namespace ql {



}  // namespace ql
