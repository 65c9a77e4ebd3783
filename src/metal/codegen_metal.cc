#include <tvm/ffi/reflection/registry.h>
#include <tvm/target/codegen.h>
TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("tilelang_ext.version", []() { return 1; });
}
