// mpp::tensor_ops::matmul2d on one simdgroup.
#pragma once
#include "simd.h"
