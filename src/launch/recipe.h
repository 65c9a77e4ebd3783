/*!
 * \file recipe.h
 * \brief Reading recipes, the data that Python hands over; see tilelang_ext/launch/plan.py for their entries.
 */
#ifndef TILELANG_EXT_LAUNCH_RECIPE_H_
#define TILELANG_EXT_LAUNCH_RECIPE_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "error.h"

namespace tilelang_ext {
namespace launch {

using Recipe = tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>;

constexpr size_t kMaxArguments = 32, kMaxBuffers = 64, kMaxFacts = 128, kMaxKey = 32, kMaxParameters = 64;

inline std::string TextOf(const Recipe& recipe, const char* key) { return recipe.at(key).cast<tvm::ffi::String>(); }

inline int64_t IntegerOf(const Recipe& recipe, const char* key, int64_t otherwise) {
  const auto found = recipe.Get(key);
  return found.has_value() ? found->cast<int64_t>() : otherwise;
}

inline tvm::ffi::Array<tvm::ffi::Any> ArrayOf(const Recipe& recipe, const char* key) {
  const auto found = recipe.Get(key);
  return found.has_value() ? found->cast<tvm::ffi::Array<tvm::ffi::Any>>() : tvm::ffi::Array<tvm::ffi::Any>();
}

/*! \brief Return the number of a buffer. Throws ValueError for a name that none has. */
inline int FindBuffer(const std::vector<std::string>& buffers, const std::string& name) {
  const auto found = std::find(buffers.begin(), buffers.end(), name);
  if (found == buffers.end()) {
    Raise("ValueError") << "plan: a step must name an argument, a workspace slot or a constant; got " << name
                        << "; see the recipe";
  }
  return static_cast<int>(found - buffers.begin());
}

inline void CheckLimit(size_t count, size_t most, const char* what, const std::string& who) {
  if (count > most) {
    Raise("ValueError") << who << ": a plan must have at most " << most << " " << what << "; got " << count
                        << "; divide the operator";
  }
}

/*! \brief Return values as Python writes a tuple. */
template <typename T>
std::string Join(const T* values, int count) {
  std::ostringstream text;
  text << "(";
  for (int i = 0; i < count; ++i) text << (i ? ", " : "") << values[i];
  text << (count == 1 ? ",)" : ")");
  return text.str();
}

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_RECIPE_H_
