/*!
 * \file prepared.cc
 * \brief From checked arguments to the driver.
 */
#include "prepared.h"

#include "error.h"

namespace tilelang_ext {
namespace launch {
namespace {

/*! \brief Return a device that the variant's machine code runs on. */
const Device& Open(Driver* driver, const Variant& variant, const DLDevice& device, const std::string& who) {
  const Device& found = driver->device(device.device_id, who);
  const int capability = found.major * 10 + found.minor;
  const bool runs = variant.arch_specific() ? capability == variant.sm()
                                            : found.major == variant.sm() / 10 && capability >= variant.sm();
  if (!runs) {
    Raise("RuntimeError") << who << ": kernels for sm_" << variant.sm() << (variant.arch_specific() ? "a" : "")
                          << " must run on compute capability " << variant.sm() / 10 << "." << variant.sm() % 10
                          << (variant.arch_specific() ? "" : " or a later one of that generation") << "; got "
                          << DeviceName(device) << " of " << found.major << "." << found.minor
                          << "; prepare it for that GPU";
  }
  return found;
}

}  // namespace

Prepared::Prepared(Shared* shared, Variant* variant, const Argument* arguments, const std::string& who)
    : shared_(shared),
      variant_(variant),
      who_(who),
      facts_(kMaxFacts),
      addresses_(kMaxBuffers),
      steps_(variant->steps().size()) {
  device_ = variant->Check(arguments, facts_.data());
  context_ = Open(&shared->driver, *variant, device_, who).context;
  workspace_bytes_ = variant->Place(arguments, facts_.data(), addresses_.data());
}

void Prepared::Launch(Stream stream) {
  Driver& driver = shared_->driver;
  const ContextGuard guard(driver, context_, who_);
  const Workspace workspace(&shared_->workspaces, driver, shared_->torch, device_, stream, workspace_bytes_, who_);
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  // Without workspace nothing changes any more once the steps are resolved, and threads need not wait for each other.
  if (workspace_bytes_ != 0 || !is_resolved_.load(std::memory_order_acquire)) {
    lock.lock();
    if (!is_resolved_ || workspace.address() != workspace_) Resolve(workspace.address());
  }
  for (size_t i = 0; i < steps_.size(); ++i) variant_->steps()[i]->Enqueue(driver, stream, who_, steps_[i]);
}

void Prepared::Resolve(uint64_t workspace) {
  is_resolved_ = false;
  variant_->MoveWorkspace(workspace - workspace_, addresses_.data());
  workspace_ = workspace;
  for (size_t i = 0; i < steps_.size(); ++i) {
    variant_->steps()[i]->Resolve(&shared_->driver, device_.device_id, addresses_.data(), facts_.data(), who_,
                                  &steps_[i]);
  }
  is_resolved_.store(true, std::memory_order_release);
}

}  // namespace launch
}  // namespace tilelang_ext
