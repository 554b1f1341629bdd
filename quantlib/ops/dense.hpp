// Dense: one matrix-vector product per image; the columns of the weights are in stream order (H, W, C).
#pragma once
#include "ql_matvec.hpp"

namespace ql {



}  // namespace ql
