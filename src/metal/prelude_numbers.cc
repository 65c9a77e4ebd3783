/*!
 * \file prelude_numbers.cc
 * \brief Wide vectors, words that the simulator defines, and functions of numbers that Metal lacks or fast math breaks.
 *
 * How a text is written: see prelude_table.h.
 */
#include "prelude_table.h"

namespace tilelang_ext {
namespace metal {
namespace {

const char* const kPrints = R"(
#ifndef TL_PRINTS
#error "T.print: a kernel on a Mac cannot print; run it with tilelang_ext.simulate, or take T.print out"
#endif
)";

}  // namespace

std::vector<Helper> NumberHelpers() {
  return {
      {"wide", {}, R"(
// A vector of more than four lanes: N chunks.
template <typename T, int N>
struct wide {
  T v[N];
};
)"},

      // ---- words that the simulator defines --------------------------------------------------------------------
      {"TL_OUTSIDE", {}, R"(
#ifndef TL_OUTSIDE  // the simulator counts; anywhere else it is the value alone
#define TL_OUTSIDE(tensor, accesses, shape, lanes, ...) (__VA_ARGS__)
#endif
)"},
      {"TL_ASSERT", {}, R"(
#ifndef TL_ASSERT
#error "T.device_assert: a kernel on a Mac cannot report; run it with tilelang_ext.simulate, or take the assertion out"
#endif
)"},
      {"debug_print_var", {}, kPrints},
      {"debug_print_buffer_value", {}, kPrints},
      {"debug_print_msg", {}, kPrints},

      // ---- tests and math that Metal lacks, or that fast math breaks -------------------------------------------
      {"is_nan", {}, R"(
inline bool$ is_nan(float$ x) { return (as_type<uint$>(x) & uint$(0x7fffffff)) > uint$(0x7f800000); }
)"},
      {"max_nan", {"is_nan"}, R"(
inline float$ max_nan(float$ a, float$ b) { return select(select(max(a, b), b, is_nan(b)), a, is_nan(a)); }
)"},
      {"min_nan", {"is_nan"}, R"(
inline float$ min_nan(float$ a, float$ b) { return select(select(min(a, b), b, is_nan(b)), a, is_nan(a)); }
)"},
      {"erf", {}, R"(
// x P(x^2) up to 1, 1 - exp(Q(x)) above.
inline float$ erf(float$ x) {
  float$ t = min(fabs(x), float$(4.0f));
  float$ s = t * t;
  float$ p = float$(1.059528005e-06f);
  p = fma(p, s, float$(-1.391170223e-05f));
  p = fma(p, s, float$(1.195694689e-04f));
  p = fma(p, s, float$(-8.542670562e-04f));
  p = fma(p, s, float$(5.223785006e-03f));
  p = fma(p, s, float$(-2.686613363e-02f));
  p = fma(p, s, float$(1.128379131e-01f));
  p = fma(p, s, float$(-3.761263889e-01f));
  p = fma(p, s, float$(1.128379167e+00f));
  float$ q = float$(-1.330939040e-05f);
  q = fma(q, t, float$(3.175720348e-04f));
  q = fma(q, t, float$(-3.436867600e-03f));
  q = fma(q, t, float$(2.262198593e-02f));
  q = fma(q, t, float$(-1.033189801e-01f));
  q = fma(q, t, float$(-6.390933195e-01f));
  q = fma(q, t, float$(-1.125925949e+00f));
  q = fma(q, t, float$(-7.569686190e-04f));
  return copysign(select(t * p, float$(1.0f) - exp(q), t > float$(1.0f)), x);
}
)"},
      {"log1p", {}, R"(
// log(1 + x), corrected for the rounding of 1 + x.
inline float$ log1p(float$ x) {
  float$ u = float$(1.0f) + x;
  return select(log(u) * (x / (u - float$(1.0f))), x, u == float$(1.0f));
}
)"},
      {"expm1", {}, R"(
// exp(x) - 1: a polynomial near zero, where the difference would cancel.
inline float$ expm1(float$ x) {
  float$ p = x * (float$(1.0f) + x * (float$(0.5f) + x * (float$(1.66666667e-1f) +
             x * (float$(4.16666667e-2f) + x * (float$(8.33333333e-3f) + x * float$(1.38888889e-3f))))));
  return select(exp(x) - float$(1.0f), p, fabs(x) < float$(0.35f));
}
)"},
      {"hypot", {}, R"(
inline float$ hypot(float$ x, float$ y) {
  float$ a = max(fabs(x), fabs(y));
  float$ b = min(fabs(x), fabs(y)) / max(a, float$(1.17549435e-38f));
  return a * sqrt(fma(b, b, float$(1.0f)));
}
)"},

      {"next_after", {}, R"(
// The float beside x in the direction of y: the next or the last code, whose order is that of magnitudes.
inline float$ next_after(float$ x, float$ y) {
  int$ code = as_type<int$>(x);
  int$ beside = select(code - int$(1), code + int$(1), (x < y) == (x > float$(0.0f)));
  beside = select(beside, (as_type<int$>(y) & int$(0x80000000)) | int$(1), x == float$(0.0f));
  beside = select(beside, as_type<int$>(y), x == y);
  return select(as_type<float$>(beside), x + y, !(x <= y) && !(x >= y));
}
)"},
  };
}

}  // namespace metal
}  // namespace tilelang_ext
