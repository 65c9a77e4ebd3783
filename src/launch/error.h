/*!
 * \file error.h
 * \brief Errors of the launcher, as `name: rule; got value; do this`.
 */
#ifndef TILELANG_EXT_LAUNCH_ERROR_H_
#define TILELANG_EXT_LAUNCH_ERROR_H_

#include <tvm/ffi/error.h>

#include <sstream>
#include <string>
#include <utility>

namespace tilelang_ext {
namespace launch {

/*! \brief Collects a message and throws at the end of the statement; Python raises the builtin exception of that kind.
 */
class Raise {
 public:
  explicit Raise(const char* kind) : kind_(kind) {}
  template <typename T>
  Raise& operator<<(const T& value) {
    message_ << value;
    return *this;
  }
  [[noreturn]] ~Raise() noexcept(false) { throw tvm::ffi::Error(kind_, message_.str(), ""); }

 private:
  const char* kind_;
  std::ostringstream message_;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_ERROR_H_
