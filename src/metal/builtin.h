/*!
 * \file builtin.h
 * \brief TIR builtins: matrix products on a lane's registers, and what keeps floats from the simplifier.
 */
#ifndef TILELANG_EXT_METAL_BUILTIN_H_
#define TILELANG_EXT_METAL_BUILTIN_H_

#include <tvm/ir/op.h>

namespace tilelang_ext {
namespace metal {

/*! \brief keep(x): x, which no simplifier sees through; see tilelang_ext/passes/float_arithmetic.py. */
const tvm::Op& keep();

/*!
 * \brief c += a * b for 8x8 tiles: metal_simdgroup_mma(c_ptr, a_ptr, b_ptr).
 *
 * Each pointer names the lane's two neighbouring elements of a tile, in `local` registers; c is float32.
 */
const tvm::Op& metal_simdgroup_mma();

/*!
 * \brief c += a * b by matmul2d of Metal 4: metal_matmul2d(c_ptr, a_ptr, b_ptr, M, N, K, trans_a, trans_b).
 *
 * The pointers name M*N/32, M*K/32 and K*N/32 elements in `local` registers, in the cooperative layout; c is float32.
 */
const tvm::Op& metal_matmul2d();

}  // namespace metal
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_METAL_BUILTIN_H_
