/*!
 * \file workspace.cc
 * \brief Taking the memory of a call.
 */
#include "workspace.h"

namespace tilelang_ext {
namespace launch {

Workspace::Workspace(WorkspacePool* pool, const Driver& driver, const Torch& torch, const DLDevice& device,
                     Stream stream, int64_t bytes, const std::string& who) {
  if (bytes == 0) return;
  int capturing = 0;
  // The default stream cannot be captured, and must not be asked while another stream is.
  if (stream != nullptr) driver.Check(driver.is_capturing(stream, &capturing), "cuStreamIsCapturing", who);
  const DLManagedTensorVersioned* memory;
  if (capturing) {
    own_ = torch.Allocate(device, bytes, who);
    memory = own_.get();
  } else {
    WorkspacePool::OfStream& workspace = pool->Find(device.device_id, stream);
    lock_ = std::unique_lock<std::mutex>(workspace.mutex);
    if (workspace.bytes < bytes) {
      workspace.memory.reset();  // first, so that torch may give the same memory, grown
      workspace.bytes = 0;
      workspace.memory = torch.Allocate(device, bytes, who);
      workspace.bytes = bytes;
    }
    memory = workspace.memory.get();
  }
  address_ = reinterpret_cast<uint64_t>(memory->dl_tensor.data) + memory->dl_tensor.byte_offset;
}

}  // namespace launch
}  // namespace tilelang_ext
