/*!
 * \file module.cc
 * \brief What Python calls: launcher(libcuda, python) -> {"plan": recipe -> {...}, "clear": ...}.
 *
 * Functions are exported by symbol and plans are closures: nothing is registered by name, so that the libraries of two
 * versions, such as an exported folder's beside the package's, live in one process.
 */
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/function.h>

#include <memory>

#include "cubin.h"
#include "plan.h"

namespace tilelang_ext {
namespace launch {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;
using tvm::ffi::Tensor;

Map<String, Function> MakePlan(const std::shared_ptr<Shared>& shared, const Recipe& recipe) {
  auto plan = std::make_shared<Plan>(shared, recipe);
  return {
      {"add", Function::FromTyped([plan](Recipe variant, Array<Bytes> cubins, Array<Tensor> constants) {
         plan->Add(variant, cubins, constants);
       })},
      {"call", Function::FromTyped([plan](int64_t tuple) { return plan->Call(tuple); })},
      {"key", Function::FromTyped([plan](int64_t tuple) { return plan->KeyOf(tuple); })},
      {"bind", Function::FromTyped([plan](int64_t tuple) { return plan->Bind(tuple); })},
  };
}

Map<String, Function> MakeLauncher(String libcuda, Map<String, int64_t> python) {
  auto shared = std::make_shared<Shared>(libcuda, python);
  return {
      {"plan", Function::FromTyped([shared](Recipe recipe) { return MakePlan(shared, recipe); })},
      {"clear", Function::FromTyped([shared]() { shared->workspaces.Clear(); })},
  };
}

String ArchOf(Bytes cubin) { return ReadCubin(std::string(cubin.data(), cubin.size()), "arch_of").arch(); }

}  // namespace
}  // namespace launch
}  // namespace tilelang_ext

TVM_FFI_DLL_EXPORT_TYPED_FUNC(launcher, tilelang_ext::launch::MakeLauncher);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(arch_of, tilelang_ext::launch::ArchOf);
