// simdgroup_matrix: the one place that knows which lane holds which element of an 8x8 matrix.
#pragma once
#include "simd.h"

namespace metal {

// Lane -> row and first of two neighbouring columns; the same for A, B and C of every type.
struct MatrixLayout {
  uchar row[sim::kLanes], column[sim::kLanes];
  SIM_FN constexpr MatrixLayout() : row(), column() {
    for (int lane = 0; lane < sim::kLanes; ++lane) {
      const int q = lane >> 2;
      row[lane] = (q & 4) | (lane >> 1 & 3);
      column[lane] = (q & 2) * 2 + (lane & 1) * 2;
    }
  }
};
inline constexpr MatrixLayout kMatrixLayout;

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "a simdgroup_matrix is 8x8");
  using storage_type = vec<T, 2>;
  storage_type elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    const int row = kMatrixLayout.row[sim::lane()], column = kMatrixLayout.column[sim::lane()];
    elements = storage_type(row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0));
  }
  storage_type& thread_elements() { return elements; }
  const storage_type& thread_elements() const { return elements; }
};

template <class T, int Rows, int Columns = Rows>
SIM_FN inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> m;
  m.elements = vec<T, 2>(value, value);
  return m;
}

// With checks, lanes meet so that one that skips a load is seen; each lane then moves its own two elements.
struct empty_frame {};
SIM_FN inline void meet_all([[maybe_unused]] const sim::Site* site) {
#ifdef SIM_CHECK
  empty_frame frame;
  sim::meet_with(frame, site, sim::kAllLanes, [](const sim::Meeting&) {});
#endif
}

template <class T, class U>
SIM_FN inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const U* source, ulong elements_per_row = 8,
                                  ulong2 origin = ulong2(0ul), bool transpose = false, SIM_SITE) {
  meet_all(site);
  const int row = kMatrixLayout.row[sim::lane()], column = kMatrixLayout.column[sim::lane()];
  source += origin.y * elements_per_row + origin.x;
  m.elements.e[0] = transpose ? source[column * elements_per_row + row] : source[row * elements_per_row + column];
  m.elements.e[1] =
      transpose ? source[(column + 1) * elements_per_row + row] : source[row * elements_per_row + column + 1];
}

template <class T, class U>
SIM_FN inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, U* target, ulong elements_per_row = 8,
                                   ulong2 origin = ulong2(0ul), bool transpose = false, SIM_SITE) {
  static_assert(is_same_v<T, U>, "simdgroup_store: matrix and memory have the same element type");
  meet_all(site);
  const int row = kMatrixLayout.row[sim::lane()], column = kMatrixLayout.column[sim::lane()];
  target += origin.y * elements_per_row + origin.x;
  (transpose ? target[column * elements_per_row + row] : target[row * elements_per_row + column]) = m.elements.e[0];
  (transpose ? target[(column + 1) * elements_per_row + row] : target[row * elements_per_row + column + 1]) =
      m.elements.e[1];
}

template <class D, class A, class B, class C>
struct multiply_frame {
  vec<D, 2>* d;
  const vec<A, 2>* a;
  const vec<B, 2>* b;
  const vec<C, 2>* c;
};

// D = A B + C in float, over k in order; lanes that are absent count as zeros.
template <class D, class A, class B, class C>
void multiply_accumulate_lanes(const sim::Meeting& m) {
  using Frame = multiply_frame<D, A, B, C>;
  alignas(32) float a[8][8] = {}, b[8][8] = {}, d[8][8] = {};
  ++sim::counts.mma;
  auto gather = [&](const Frame& f, int lane) {
    const int row = kMatrixLayout.row[lane], column = kMatrixLayout.column[lane];
    a[row][column] = float(f.a->e[0]), a[row][column + 1] = float(f.a->e[1]);
    b[row][column] = float(f.b->e[0]), b[row][column + 1] = float(f.b->e[1]);
    d[row][column] = float(f.c->e[0]), d[row][column + 1] = float(f.c->e[1]);
  };
  auto scatter = [&](Frame& f, int lane) {
    const int row = kMatrixLayout.row[lane], column = kMatrixLayout.column[lane];
    f.d->e[0] = D(d[row][column]), f.d->e[1] = D(d[row][column + 1]);
  };
  sim::each_lane<Frame>(m, gather);
  typedef float Row __attribute__((vector_size(32)));
  Row rows[8];
  for (int k = 0; k < 8; ++k) rows[k] = *(const Row*)b[k];
  for (int i = 0; i < 8; ++i) {
    Row sum = *(const Row*)d[i];
    for (int k = 0; k < 8; ++k) sum += a[i][k] * rows[k];
    *(Row*)d[i] = sum;
  }
  sim::each_lane<Frame>(m, scatter);
}

template <class D, class A, class B, class C>
SIM_FN inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                                 const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                                 SIM_SITE) {
  multiply_frame<D, A, B, C> frame{&d.elements, &a.elements, &b.elements, &c.elements};
  sim::meet(multiply_accumulate_lanes<D, A, B, C>, &frame, site, sim::kAllLanes);
}
template <class D, class A, class B>
SIM_FN inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                      const simdgroup_matrix<B, 8, 8>& b, SIM_SITE) {
  simdgroup_matrix<D, 8, 8> zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero, site);
}

}  // namespace metal

using simdgroup_float8x8 = metal::simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = metal::simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = metal::simdgroup_matrix<bfloat, 8, 8>;
namespace metal {
using ::simdgroup_bfloat8x8;
using ::simdgroup_float8x8;
using ::simdgroup_half8x8;
}  // namespace metal
