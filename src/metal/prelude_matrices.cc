/*!
 * \file prelude_matrices.cc
 * \brief Matrix instructions on the registers of a simdgroup.
 *
 * How a text is written: see prelude_table.h.
 */
#include "prelude_table.h"

namespace tilelang_ext {
namespace metal {

std::vector<Helper> MatrixHelpers() {
  return {
      // ---- matrices --------------------------------------------------------------------------------------------
      {"simdgroup_mma", {}, R"(
// c += a * b on 8x8 tiles. A lane holds two neighbours of a row: q = lane / 4, row (q & 4) | (lane / 2 & 3),
// column (q & 2) * 2 + (lane & 1) * 2. T is the common element type of the operands.
template <typename T, typename A, typename B>
inline void simdgroup_mma(thread float* c, const thread A* a, const thread B* b) {
  simdgroup_matrix<T, 8, 8> ma, mb;
  simdgroup_matrix<float, 8, 8> mc;
  reinterpret_cast<thread vec<T, 2>&>(ma.thread_elements()) = vec<T, 2>(T(a[0]), T(a[1]));
  reinterpret_cast<thread vec<T, 2>&>(mb.thread_elements()) = vec<T, 2>(T(b[0]), T(b[1]));
  reinterpret_cast<thread float2&>(mc.thread_elements()) = float2(c[0], c[1]);
  simdgroup_multiply_accumulate(mc, ma, mb, mc);
  const float2 sum = reinterpret_cast<thread float2&>(mc.thread_elements());
  c[0] = sum.x;
  c[1] = sum.y;
}
)"},
      {"matmul2d", {}, R"(
// c += a * b by one simdgroup; each operand is the lane's share in the cooperative layout of 16x16 fragments.
template <int M, int N, int K, bool TRANSPOSE_A, bool TRANSPOSE_B, typename A, typename B>
inline void matmul2d(thread float* c, const thread A* a, const thread B* b) {
  constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
      M, N, K, TRANSPOSE_A, TRANSPOSE_B, true, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  mpp::tensor_ops::matmul2d<descriptor, metal::execution_simdgroup> op;
  auto ta = op.template get_left_input_cooperative_tensor<A, B, float>();
  auto tb = op.template get_right_input_cooperative_tensor<A, B, float>();
  auto tc = op.template get_destination_cooperative_tensor<decltype(ta), decltype(tb), float>();
  for (ushort i = 0; i < M * K / 32; ++i) {
    ta[i] = a[i];
  }
  for (ushort i = 0; i < K * N / 32; ++i) {
    tb[i] = b[i];
  }
  for (ushort i = 0; i < M * N / 32; ++i) {
    tc[i] = c[i];
  }
  op.run(ta, tb, tc);
  for (ushort i = 0; i < M * N / 32; ++i) {
    c[i] = tc[i];
  }
}
)"},
  };
}

}  // namespace metal
}  // namespace tilelang_ext
