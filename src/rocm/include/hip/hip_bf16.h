// Stand-in for ROCm's <hip/hip_bf16.h>. TileLang's HIP text includes it and uses hip_bfloat16 alone.
#pragma once

#include <hip/hip_bfloat16.h>
