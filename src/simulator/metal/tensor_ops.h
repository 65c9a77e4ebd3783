// mpp::tensor_ops::matmul2d on one simdgroup: cooperative tensors in registers.
#pragma once
#include "simd.h"

namespace metal {
struct execution_simdgroup {};
}  // namespace metal

namespace mpp::tensor_ops {

struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };
  int m, n, k;
  bool transpose_left, transpose_right, relaxed_precision;
  mode matmul_mode;
  SIM_FN constexpr matmul2d_descriptor(int m, int n, int k, bool transpose_left = false, bool transpose_right = false,
                                       bool relaxed_precision = false, mode matmul_mode = mode::multiply)
      : m(m),
        n(n),
        k(k),
        transpose_left(transpose_left),
        transpose_right(transpose_right),
        relaxed_precision(relaxed_precision),
        matmul_mode(matmul_mode) {}
};

// A matrix of Rows x Columns as it lies in memory, in 16x16 fragments in row-major order. Of a fragment a lane holds
// columns c .. c+3 of row r as elements 0-3 and of row r+8 as elements 4-7.
template <class T, int Rows, int Columns>
struct cooperative_tensor {
  static_assert(Rows % 16 == 0 && Columns % 16 == 0, "matmul2d: sides are multiples of 16");
  using element_type = T;
  static constexpr int kElements = Rows * Columns / sim::kLanes;
  alignas(16) T elements[kElements];
  SIM_FN T& operator[](int i) { return elements[i]; }
  SIM_FN const T& operator[](int i) const { return elements[i]; }
  SIM_FN static constexpr int get_capacity() { return kElements; }

  template <class Visit>
  SIM_FN static void each_place(int lane, Visit visit) {
    const int q = lane >> 2, row = (q & 4) | (lane >> 1 & 3), column = ((q & 2) | (lane & 1)) * 4;
    for (int i = 0; i < kElements; ++i) {
      const int fragment = i / 8;
      visit(fragment / (Columns / 16) * 16 + row + i % 8 / 4 * 8, fragment % (Columns / 16) * 16 + column + i % 4, i);
    }
  }
};

template <matmul2d_descriptor d, class Scope>
struct matmul2d {
  static_assert(metal::is_same_v<Scope, metal::execution_simdgroup>,
                "matmul2d: the simulator runs it on one simdgroup");
  static_assert(d.m == 32 || d.n == 32 || d.k == 32, "matmul2d: one of M, N, K must be 32");
  template <class A>
  using Left = cooperative_tensor<A, d.transpose_left ? d.k : d.m, d.transpose_left ? d.m : d.k>;
  template <class B>
  using Right = cooperative_tensor<B, d.transpose_right ? d.n : d.k, d.transpose_right ? d.k : d.n>;
  template <class C>
  using Destination = cooperative_tensor<C, d.m, d.n>;

  template <class A, class B, class C>
  SIM_FN Left<A> get_left_input_cooperative_tensor() const {
    return uninitialised<Left<A>>();
  }
  template <class A, class B, class C>
  SIM_FN Right<B> get_right_input_cooperative_tensor() const {
    return uninitialised<Right<B>>();
  }
  template <class LeftTensor, class RightTensor, class C>
  SIM_FN Destination<C> get_destination_cooperative_tensor() const {
    return uninitialised<Destination<C>>();
  }

  template <class A, class B, class C>
  SIM_FN void run(const A& a, const B& b, C& c, SIM_SITE) const {
    Frame<A, B, C> frame{&a, &b, &c};
    sim::meet(multiply<A, B, C>, &frame, site, sim::kAllLanes);
  }

 private:
  template <class Tensor>
  SIM_FN static Tensor uninitialised() {
    Tensor tensor;  // not-a-numbers, when checking
    return tensor;
  }

  template <class A, class B, class C>
  struct Frame {
    const A* a;
    const B* b;
    C* c;
  };

  template <class A, class B, class C>
  static void multiply(const sim::Meeting& m) {
    using F = Frame<A, B, C>;
    static float a[d.m][d.k], b[d.k][d.n], c[d.m][d.n];  // no reentrance: a process runs one thread
    __builtin_memset(a, 0, sizeof a), __builtin_memset(b, 0, sizeof b), __builtin_memset(c, 0, sizeof c);
    sim::counts.mma += d.m * d.n * d.k / 512;
    sim::each_lane<F>(m, [&](F& f, int lane) {
      A::each_place(lane,
                    [&](int r, int s, int i) { (d.transpose_left ? a[s][r] : a[r][s]) = float(f.a->elements[i]); });
      B::each_place(lane,
                    [&](int r, int s, int i) { (d.transpose_right ? b[s][r] : b[r][s]) = float(f.b->elements[i]); });
      if (d.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate)
        C::each_place(lane, [&](int r, int s, int i) { c[r][s] = float(f.c->elements[i]); });
    });
    for (int i = 0; i < d.m; ++i)
      for (int k = 0; k < d.k; ++k)
        for (int j = 0; j < d.n; ++j) c[i][j] += a[i][k] * b[k][j];
    sim::each_lane<F>(m, [&](F& f, int lane) {
      C::each_place(lane, [&](int r, int s, int i) { f.c->elements[i] = typename C::element_type(c[r][s]); });
    });
  }
};

}  // namespace mpp::tensor_ops
