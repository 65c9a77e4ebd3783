// HIP for a CPU: what a translated kernel is compiled with. The headers that its text includes are empty or TileLang's.
#pragma once
#pragma clang attribute push(__attribute__((no_sanitize("thread", "bounds"))), apply_to = function)
#pragma clang attribute push(__attribute__((always_inline)), apply_to = function)
#pragma clang attribute push(__attribute__((nodebug)), apply_to = hasType(functionType))
#include "architecture.h"
#include "atomic.h"
#include "buffer_load.h"
#include "fp8.h"
#include "launch.h"
#include "math.h"
#include "matrix.h"
#include "standard.h"
#include "types.h"
#include "wave.h"
#pragma clang attribute pop
#pragma clang attribute pop
#pragma clang attribute pop
