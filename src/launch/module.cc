/*!
 * \file module.cc
 * \brief What Python calls: connect(addresses of CPython) -> the type of plans, launcher(libcuda, addresses,
 * observers).
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

void* ObjectAt(int64_t address) { return reinterpret_cast<void*>(address); }

/*! \brief Make an object of the type a plan, and return its other methods. `members` are of an
 * argument each: its number, the address of an object, and the integer it stands for. */
Map<String, Function> MakePlan(const std::shared_ptr<Shared>& shared, int64_t object, const Recipe& recipe,
                               const Array<Array<int64_t>>& members) {
  auto plan = std::make_shared<Plan>(shared, recipe);
  for (const Array<int64_t>& member : members) plan->AddMember(member[0], ObjectAt(member[1]), member[2]);
  Attach(ObjectAt(object), plan);
  return {
      {"add", Function::FromTyped([plan](Recipe variant, Array<Bytes> cubins, Array<Tensor> constants) {
         plan->Add(variant, cubins, constants);
       })},
      {"key", Function::FromTyped([plan](int64_t tuple) { return plan->KeyOf(tuple); })},
      {"bind",
       Function::FromTyped([plan](int64_t tuple, int64_t object) { Attach(ObjectAt(object), plan->Bind(tuple)); })},
  };
}

Map<String, Function> MakeLauncher(String libcuda, Addresses addresses, Array<int64_t> observers) {
  auto shared = std::make_shared<Shared>(libcuda, addresses, observers);
  return {
      {"plan", Function::FromTyped([shared](int64_t object, Recipe recipe, Array<Array<int64_t>> members) {
         return MakePlan(shared, object, recipe, members);
       })},
      {"clear", Function::FromTyped([shared]() { shared->workspaces.Clear(); })},
  };
}

int64_t Connect(Addresses addresses) {
  cpython.Connect(addresses);
  return reinterpret_cast<int64_t>(MakeCallableType());
}

String ArchOf(Bytes cubin) { return ReadCubin(std::string(cubin.data(), cubin.size()), "arch_of").arch(); }

}  // namespace
}  // namespace launch
}  // namespace tilelang_ext

TVM_FFI_DLL_EXPORT_TYPED_FUNC(connect, tilelang_ext::launch::Connect);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(launcher, tilelang_ext::launch::MakeLauncher);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(arch_of, tilelang_ext::launch::ArchOf);
