/*!
 * \file driver.h
 * \brief What the launcher uses of the CUDA driver, found at run time: the library is built and loaded without CUDA.
 *
 * Layouts and numbers are those of the CUDA driver API, 12.0 and later.
 */
#ifndef TILELANG_EXT_LAUNCH_DRIVER_H_
#define TILELANG_EXT_LAUNCH_DRIVER_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

namespace tilelang_ext {
namespace launch {

using Context = void*;       // CUcontext
using Module = void*;        // CUmodule
using CudaFunction = void*;  // CUfunction
using Stream = void*;        // CUstream

constexpr int kMaxDevices = 64;

/*! \brief CUtensorMap: what a TMA copy reads of a tensor. */
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

/*! \brief CUlaunchAttribute. */
struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    uint32_t cluster[3];
    int programmatic_stream_serialization;
  } value;
};
static_assert(sizeof(LaunchAttribute) == 72, "CUlaunchAttribute");

constexpr int kClusterDimension = 4, kProgrammaticStreamSerialization = 6;  // CUlaunchAttributeID

/*! \brief CUlaunchConfig. */
struct LaunchConfig {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  uint32_t num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56, "CUlaunchConfig");

/*! \brief A device that kernels were launched on: its primary context and its compute capability. */
struct Device {
  Context context;
  int major;
  int minor;
};

/*! \brief The driver of a path, opened when it is first needed. */
class Driver {
 public:
  explicit Driver(std::string path) : path_(std::move(path)) {}
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  /*! \brief Return a device. Throws RuntimeError, naming `who`, where there is no driver or no such device. */
  const Device& device(int id, const std::string& who) {
    const Device* found = id >= 0 && id < kMaxDevices ? devices_[id].load(std::memory_order_acquire) : nullptr;
    return found != nullptr ? *found : Open(id, who);
  }

  /*! \brief Throw RuntimeError, naming `who` and what was called, unless `result` is CUDA_SUCCESS. */
  void Check(int result, const char* call, const std::string& who) const;

  int (*get_current)(Context*);
  int (*push_current)(Context);
  int (*pop_current)(Context*);
  int (*load_module)(Module*, const void*);
  int (*get_function)(CudaFunction*, Module, const char*);
  int (*set_attribute)(CudaFunction, int, int);
  int (*launch)(const LaunchConfig*, CudaFunction, void**, void**);
  int (*encode_tiled)(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                      const uint32_t*, int, int, int, int);
  int (*is_capturing)(Stream, int*);
  int (*exchange_capture_mode)(int*);
  int (*fill)(uint64_t, unsigned char, size_t, Stream);

 private:
  const Device& Open(int id, const std::string& who);
  void Load(const std::string& who);

  std::string path_;
  std::mutex mutex_;
  bool loaded_ = false;
  int (*init_)(unsigned);
  int (*get_device_)(int*, int);
  int (*get_device_attribute_)(int*, int, int);
  int (*retain_context_)(Context*, int);
  int (*get_error_name_)(int, const char**);
  std::atomic<const Device*> devices_[kMaxDevices] = {};
};

/*! \brief Makes a context current in this thread while it lives, if it is not; what was current is so again afterwards.
 */
class ContextGuard {
 public:
  ContextGuard(const Driver& driver, Context context, const std::string& who) : driver_(driver) {
    Context current = nullptr;
    driver.Check(driver.get_current(&current), "cuCtxGetCurrent", who);
    if (current != context) {
      driver.Check(driver.push_current(context), "cuCtxPushCurrent", who);
      pushed_ = true;
    }
  }
  ~ContextGuard() {
    Context popped;
    if (pushed_) driver_.pop_current(&popped);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_DRIVER_H_
