// Input: the network's input stream; the bus ends that feed it live in ql_glue.hpp.
#pragma once
#include "ql_glue.hpp"

namespace ql {



}  // namespace ql
