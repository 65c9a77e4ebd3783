// Arguments of the entry function: converted to whatever type the kernel declares.
#pragma once
#include "../engine.h"
#include "vec.h"

namespace sim {

struct PointerArgument {
  int index;
  template <class T>
  SIM_FN operator T*() const {
    return static_cast<T*>(buffer(index));
  }
};
struct ReferenceArgument {
  int index;
  template <class T>
  SIM_FN operator T&() const {
    return *static_cast<T*>(buffer(index));
  }
};
struct Position {
  unsigned v[3];
  template <class T>
  SIM_FN operator T() const {
    if constexpr (metal::is_integral_v<T>)
      return T(v[0]);
    else if constexpr (metal::vec_size<T> == 2)
      return T(v[0], v[1]);
    else
      return T(v[0], v[1], v[2]);
  }
};

SIM_FN inline Position thread_position_in_threadgroup() {
  return {current->position[0], current->position[1], current->position[2]};
}
SIM_FN inline Position threadgroup_position_in_grid() {
  return {group_position[0], group_position[1], group_position[2]};
}
SIM_FN inline Position threadgroups_per_grid() { return {launch.grid[0], launch.grid[1], launch.grid[2]}; }
SIM_FN inline Position threads_per_threadgroup() { return {launch.threads[0], launch.threads[1], launch.threads[2]}; }
SIM_FN inline Position dispatch_threads_per_threadgroup() { return threads_per_threadgroup(); }
SIM_FN inline Position threads_per_grid() {
  return {launch.grid[0] * launch.threads[0], launch.grid[1] * launch.threads[1], launch.grid[2] * launch.threads[2]};
}
SIM_FN inline Position thread_position_in_grid() {
  Position p = thread_position_in_threadgroup();
  for (int i = 0; i < 3; ++i) p.v[i] += group_position[i] * launch.threads[i];
  return p;
}
SIM_FN inline unsigned thread_index_in_threadgroup() { return current->index; }
SIM_FN inline unsigned thread_index_in_simdgroup() { return current->lane; }
SIM_FN inline unsigned simdgroup_index_in_threadgroup() { return current->index / kLanes; }
SIM_FN inline unsigned simdgroups_per_threadgroup() {
  return (launch.threads[0] * launch.threads[1] * launch.threads[2] + kLanes - 1) / kLanes;
}
SIM_FN inline unsigned dispatch_simdgroups_per_threadgroup() { return simdgroups_per_threadgroup(); }
SIM_FN inline unsigned thread_index_in_quadgroup() { return current->lane % 4; }
SIM_FN inline unsigned quadgroup_index_in_threadgroup() { return current->index / 4; }
SIM_FN inline unsigned quadgroups_per_threadgroup() {
  return (launch.threads[0] * launch.threads[1] * launch.threads[2] + 3) / 4;
}
SIM_FN inline unsigned dispatch_quadgroups_per_threadgroup() { return quadgroups_per_threadgroup(); }
SIM_FN inline unsigned threads_per_simdgroup() { return kLanes; }
SIM_FN inline unsigned thread_execution_width() { return kLanes; }

}  // namespace sim
