/*!
 * \file prepared.h
 * \brief A call whose arguments are known: checked, placed, and with every parameter of every kernel computed.
 */
#ifndef TILELANG_EXT_LAUNCH_PREPARED_H_
#define TILELANG_EXT_LAUNCH_PREPARED_H_

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.h"
#include "torch.h"
#include "variant.h"
#include "workspace.h"

namespace tilelang_ext {
namespace launch {

/*! \brief What all plans of a process share. */
struct Shared {
  Shared(std::string libcuda, const Addresses& addresses, const tvm::ffi::Array<int64_t>& observers)
      : driver(std::move(libcuda)), torch(addresses, observers) {}
  Driver driver;
  Torch torch;
  WorkspacePool workspaces;
};

/*! \brief A variant for the tensors of one call. It keeps no tensor: whoever launches it answers for their memory. */
class Prepared {
 public:
  /*! \brief Check the arguments; throws what is wrong with them, or with their device. */
  Prepared(Shared* shared, Variant* variant, const Argument* arguments, const std::string& who);

  const DLDevice& device() const { return device_; }
  /*! \brief Enqueue all steps on a stream of the device; any thread may, with or without Python's lock. */
  void Launch(Stream stream);

 private:
  void Resolve(uint64_t workspace);

  Shared* shared_;
  Variant* variant_;
  const std::string& who_;
  DLDevice device_;
  Context context_;
  std::vector<int64_t> facts_;
  std::vector<uint64_t> addresses_;
  int64_t workspace_bytes_;
  std::mutex mutex_;  // of what follows, while it may change
  std::atomic<bool> is_resolved_{false};
  uint64_t workspace_ = 0;  // that addresses_ and steps_ are for
  std::vector<Resolved> steps_;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_PREPARED_H_
