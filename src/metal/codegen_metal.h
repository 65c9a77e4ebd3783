/*!
 * \file codegen_metal.h
 * \brief From lowered TIR to Metal Shading Language.
 */
#ifndef TILELANG_EXT_METAL_CODEGEN_METAL_H_
#define TILELANG_EXT_METAL_CODEGEN_METAL_H_

#include <tvm/ffi/extra/module.h>
#include <tvm/ir/module.h>
#include <tvm/target/target.h>

namespace tilelang_ext {
namespace metal {

/*!
 * \brief A runtime module with the Metal text of every kernel in `mod`.
 *
 * Signature of a kernel: the buffers in parameter order as buffer(0..n-1), `const device` where the attribute
 * `tl.readonly_param_indices` says so; then all scalars in one constant struct at buffer(n), each in a slot of 8 bytes.
 */
tvm::ffi::Module BuildMetal(tvm::IRModule mod, tvm::Target target);

}  // namespace metal
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_METAL_CODEGEN_METAL_H_
