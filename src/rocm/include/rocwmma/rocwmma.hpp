// Stand-in for <rocwmma/rocwmma.hpp>, which TileLang's templates include and do not use, but for what it includes
// itself.
#pragma once

#include <hip/hip_bfloat16.h>
#include <hip/hip_fp16.h>
