/*!
 * \file workspace.h
 * \brief Memory between the kernels of a plan: one allocation for each stream, shared by all plans.
 *
 * Kernels of one stream run one after the other, so the calls of all plans there may share memory. A call holds the
 * lock of its stream while it enqueues, so that the kernels of two threads' calls do not mix. A call that is captured
 * in a graph has memory of its own, from the graph's pool: the graph may run beside later calls of the stream it was
 * captured on.
 */
#ifndef TILELANG_EXT_LAUNCH_WORKSPACE_H_
#define TILELANG_EXT_LAUNCH_WORKSPACE_H_

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "driver.h"
#include "torch.h"

namespace tilelang_ext {
namespace launch {

/*! \brief The allocations of streams. */
class WorkspacePool {
 public:
  struct OfStream {
    std::mutex mutex;  // held while kernels that use the memory are enqueued
    ManagedTensor memory;
    int64_t bytes = 0;
  };

  OfStream& Find(int device, Stream stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<OfStream>& found = streams_[{device, stream}];
    if (found == nullptr) found = std::make_unique<OfStream>();
    return *found;
  }

  /*! \brief Give all memory back to torch, which keeps it until the work that is enqueued on each stream is done. */
  void Clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [key, workspace] : streams_) {
      std::lock_guard<std::mutex> enqueuing(workspace->mutex);
      workspace->memory.reset();
      workspace->bytes = 0;
    }
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, Stream>, std::unique_ptr<OfStream>> streams_;
};

/*! \brief The memory of one call while it enqueues; of no bytes, it takes none. */
class Workspace {
 public:
  Workspace(WorkspacePool* pool, const Driver& driver, const Torch& torch, const DLDevice& device, Stream stream,
            int64_t bytes, const std::string& who);

  uint64_t address() const { return address_; }
  bool captured() const { return own_ != nullptr; }

 private:
  std::unique_lock<std::mutex> lock_;
  ManagedTensor own_;  // of a call that is captured
  uint64_t address_ = 0;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_WORKSPACE_H_
