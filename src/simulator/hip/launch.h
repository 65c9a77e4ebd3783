// Qualifiers, thread indices, and the arguments of an entry function.
#pragma once
#include "../engine.h"

#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Lanes share memory inside one C++ function: nothing is restricted.
#define __restrict__
#define __restrict

struct dim3 {
  unsigned x, y, z;
};

namespace sim {

// Constant as long as a thread lives; `launch` and `group_position` are the run time's own.
__attribute__((const)) inline unsigned thread_position(int axis) { return current->position[axis]; }
struct ThreadPosition {
  __declspec(property(get = get_x)) unsigned x;
  __declspec(property(get = get_y)) unsigned y;
  __declspec(property(get = get_z)) unsigned z;
  unsigned get_x() const { return thread_position(0); }
  unsigned get_y() const { return thread_position(1); }
  unsigned get_z() const { return thread_position(2); }
};
struct GroupPosition {
  __declspec(property(get = get_x)) unsigned x;
  __declspec(property(get = get_y)) unsigned y;
  __declspec(property(get = get_z)) unsigned z;
  unsigned get_x() const { return group_position[0]; }
  unsigned get_y() const { return group_position[1]; }
  unsigned get_z() const { return group_position[2]; }
  operator dim3() const { return {x, y, z}; }
};
template <const unsigned (&extents)[3]>
struct Extents {
  __declspec(property(get = get_x)) unsigned x;
  __declspec(property(get = get_y)) unsigned y;
  __declspec(property(get = get_z)) unsigned z;
  unsigned get_x() const { return extents[0]; }
  unsigned get_y() const { return extents[1]; }
  unsigned get_z() const { return extents[2]; }
};

struct PointerArgument {
  int index;
  template <class T>
  operator T*() const {
    return static_cast<T*>(buffer(index));
  }
};
// A number of any type, as an integer and as a floating-point value.
struct ScalarArgument {
  int index;
  template <class T>
  operator T() const {
    struct Value {
      long integer;
      double floating;
    };
    const Value* value = static_cast<const Value*>(buffer(index));
    if constexpr (T(0.5) != T(0))
      return T(value->floating);
    else
      return T(value->integer);
  }
};

// `extern __shared__ T name[]`, whose size the launch gives.
template <class T, unsigned long align, class Tag>
inline T* dynamic_shared(const char* name, Tag) {
  static int slot = -1;
  return static_cast<T*>(threadgroup_array(slot, name, dynamic_size(), align));
}

}  // namespace sim

inline constexpr sim::ThreadPosition threadIdx{};
inline constexpr sim::GroupPosition blockIdx{};
inline constexpr sim::Extents<sim::launch.threads> blockDim{};
inline constexpr sim::Extents<sim::launch.grid> gridDim{};
inline constexpr int warpSize = sim::kLanes;
