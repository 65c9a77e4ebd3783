/*!
 * \file driver.cc
 * \brief Opening the CUDA driver and its devices.
 */
#include "driver.h"

#include <dlfcn.h>

#include "error.h"

namespace tilelang_ext {
namespace launch {
namespace {

constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // CUdevice_attribute

}  // namespace

void Driver::Load(const std::string& who) {
  if (loaded_) return;
  void* library = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    Raise("RuntimeError") << who << ": needs the NVIDIA driver; got " << (reason == nullptr ? path_ : reason)
                          << "; run it on a machine with an NVIDIA GPU";
  }
  auto find = [&](const char* name, auto* function) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) {
      Raise("RuntimeError") << who << ": needs an NVIDIA driver for CUDA 12 or later; got " << path_ << " without "
                            << name << "; update the driver";
    }
    *reinterpret_cast<void**>(function) = symbol;
  };
  find("cuInit", &init_);
  find("cuDeviceGet", &get_device_);
  find("cuDeviceGetAttribute", &get_device_attribute_);
  find("cuDevicePrimaryCtxRetain", &retain_context_);
  find("cuGetErrorName", &get_error_name_);
  find("cuCtxGetCurrent", &get_current);
  find("cuCtxPushCurrent_v2", &push_current);
  find("cuCtxPopCurrent_v2", &pop_current);
  find("cuModuleLoadData", &load_module);
  find("cuModuleGetFunction", &get_function);
  find("cuFuncSetAttribute", &set_attribute);
  find("cuLaunchKernelEx", &launch);
  find("cuTensorMapEncodeTiled", &encode_tiled);
  find("cuStreamIsCapturing", &is_capturing);
  find("cuThreadExchangeStreamCaptureMode", &exchange_capture_mode);
  find("cuMemsetD8Async", &fill);
  Check(init_(0), "cuInit", who);
  loaded_ = true;
}

const Device& Driver::Open(int id, const std::string& who) {
  std::lock_guard<std::mutex> lock(mutex_);
  Load(who);
  if (id < 0 || id >= kMaxDevices) {
    Raise("ValueError") << who << ": devices must have an index below " << kMaxDevices << "; got " << id
                        << "; use another";
  }
  if (const Device* found = devices_[id].load(std::memory_order_acquire)) return *found;
  int ordinal;
  Device device;
  Check(get_device_(&ordinal, id), "cuDeviceGet", who);
  Check(get_device_attribute_(&device.major, kComputeCapabilityMajor, ordinal), "cuDeviceGetAttribute", who);
  Check(get_device_attribute_(&device.minor, kComputeCapabilityMinor, ordinal), "cuDeviceGetAttribute", who);
  Check(retain_context_(&device.context, ordinal), "cuDevicePrimaryCtxRetain", who);
  // Kept for the life of the process, as torch keeps its primary contexts.
  const Device* kept = new Device(device);
  devices_[id].store(kept, std::memory_order_release);
  return *kept;
}

void Driver::Check(int result, const char* call, const std::string& who) const {
  if (result == 0) return;
  const char* name = nullptr;
  get_error_name_(result, &name);
  Raise("RuntimeError") << who << ": " << call << " must succeed; got " << (name == nullptr ? "an unknown error" : name)
                        << " (" << result << "); see the CUDA driver API for it";
}

}  // namespace launch
}  // namespace tilelang_ext
