// Metal's standard library for a CPU: what a translated kernel is compiled with.
#pragma once
#pragma clang attribute push(__attribute__((no_sanitize("thread", "bounds"))), apply_to = function)
#pragma clang attribute push(__attribute__((always_inline)), apply_to = function)
#include "arguments.h"
#include "atomic.h"
#include "debug.h"
#include "math.h"
#include "matrix.h"
#include "simd.h"
#include "tensor_ops.h"
#include "types.h"
#include "vec.h"
#pragma clang attribute pop
#pragma clang attribute pop
#define METAL_FUNC inline
