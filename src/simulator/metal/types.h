// Scalar types of MSL, and the type traits of its library.
#pragma once

// Shim functions have no debug information, so that their accesses belong to the kernel's line that calls them.
#define SIM_FN __attribute__((nodebug))

namespace std {
template <class T>
class initializer_list {  // the shape that the compiler fills
  const T* begin_;
  unsigned long size_;

 public:
  SIM_FN constexpr unsigned long size() const { return size_; }
  SIM_FN constexpr const T* begin() const { return begin_; }
  SIM_FN constexpr const T* end() const { return begin_ + size_; }
};
}  // namespace std

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
typedef _Float16 half;

// Nearest even.
SIM_FN constexpr unsigned short round_to_bf16(float v) {
  const unsigned bits = __builtin_bit_cast(unsigned, v);
  const unsigned rounded = v != v ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return rounded >> 16;
}

// bfloat: a class of 16 bits. clang converts neither half to __bf16 nor back, and moves __bf16 through float by a
// library function that older run times lack. Every operation rounds.
struct bfloat {
  unsigned short bits;
  bfloat() = default;
  SIM_FN constexpr bfloat(float v) : bits(round_to_bf16(v)) {}
  SIM_FN constexpr bfloat(half v) : bits(round_to_bf16((float)v)) {}
  SIM_FN constexpr bfloat(double v) : bits(round_to_bf16((float)v)) {}
#define SIM_FROM_INTEGER(T) \
  SIM_FN constexpr bfloat(T v) : bits(round_to_bf16((float)v)) {}
  SIM_FROM_INTEGER(bool)
  SIM_FROM_INTEGER(char)
  SIM_FROM_INTEGER(signed char)
  SIM_FROM_INTEGER(uchar)
  SIM_FROM_INTEGER(short)
  SIM_FROM_INTEGER(ushort)
  SIM_FROM_INTEGER(int)
  SIM_FROM_INTEGER(uint)
  SIM_FROM_INTEGER(long)
  SIM_FROM_INTEGER(ulong)
#undef SIM_FROM_INTEGER
  SIM_FN constexpr operator float() const { return __builtin_bit_cast(float, (unsigned)bits << 16); }
#define SIM_ASSIGN(op)                                  \
  SIM_FN constexpr bfloat& operator op## = (bfloat o) { \
    bits = round_to_bf16(float(*this) op float(o));     \
    return *this;                                       \
  }
  SIM_ASSIGN(+)
  SIM_ASSIGN(-)
  SIM_ASSIGN(*)
  SIM_ASSIGN(/)
#undef SIM_ASSIGN
  SIM_FN constexpr bfloat operator-() const { return bfloat(-float(*this)); }
};
#define SIM_BINARY(op) \
  SIM_FN constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }
SIM_BINARY(+)
SIM_BINARY(-)
SIM_BINARY(*)
SIM_BINARY(/)
#undef SIM_BINARY
// A bfloat with an integer is a bfloat; with a float, a float (the built-in operator after conversion).
#define SIM_MIXED(op, T)                                                        \
  SIM_FN constexpr bfloat operator op(bfloat a, T b) { return a op bfloat(b); } \
  SIM_FN constexpr bfloat operator op(T a, bfloat b) { return bfloat(a) op b; }
#define SIM_MIXED_ALL(op) \
  SIM_MIXED(op, int)      \
  SIM_MIXED(op, uint)     \
  SIM_MIXED(op, short)    \
  SIM_MIXED(op, ushort)   \
  SIM_MIXED(op, long)     \
  SIM_MIXED(op, ulong)
SIM_MIXED_ALL(+)
SIM_MIXED_ALL(-)
SIM_MIXED_ALL(*)
SIM_MIXED_ALL(/)
#undef SIM_MIXED_ALL
#undef SIM_MIXED
SIM_FN constexpr float operator+(bfloat a, float b) { return (float)a + b; }
SIM_FN constexpr float operator+(float a, bfloat b) { return a + (float)b; }
SIM_FN constexpr float operator-(bfloat a, float b) { return (float)a - b; }
SIM_FN constexpr float operator-(float a, bfloat b) { return a - (float)b; }
SIM_FN constexpr float operator*(bfloat a, float b) { return (float)a * b; }
SIM_FN constexpr float operator*(float a, bfloat b) { return a * (float)b; }
SIM_FN constexpr float operator/(bfloat a, float b) { return (float)a / b; }
SIM_FN constexpr float operator/(float a, bfloat b) { return a / (float)b; }

SIM_FN constexpr half operator"" h(long double v) { return (half)v; }
SIM_FN constexpr bfloat operator"" bf(long double v) { return bfloat((float)v); }

namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  SIM_FN constexpr operator T() const { return v; }
};
template <bool b>
using bool_constant = integral_constant<bool, b>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool b, class T = void>
using enable_if_t = typename enable_if<b, T>::type;
template <bool, class T, class U>
struct conditional {
  using type = T;
};
template <class T, class U>
struct conditional<false, T, U> {
  using type = U;
};
template <bool b, class T, class U>
using conditional_t = typename conditional<b, T, U>::type;

template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
using remove_const_t = __remove_const(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
using remove_pointer_t = __remove_pointer(T);
template <class T>
using remove_addrspace_t = __remove_cv(__remove_reference_t(T));
template <class T>
struct remove_cv {
  using type = __remove_cv(T);
};
template <class T>
struct remove_reference {
  using type = __remove_reference_t(T);
};
template <class T>
struct remove_pointer {
  using type = __remove_pointer(T);
};

template <class T>
T declval();

template <class T, class U>
struct is_same : bool_constant<__is_same(T, U)> {};
template <class T, class U>
constexpr bool is_same_v = __is_same(T, U);
template <class... B>
struct conjunction : bool_constant<(B::value && ...)> {};
template <class... B>
struct disjunction : bool_constant<(B::value || ...)> {};
template <class... B>
using _disjunction = disjunction<B...>;  // the name that Apple's own headers use
template <class T, class U>
struct is_convertible : bool_constant<__is_convertible_to(T, U)> {};
template <class T, class U>
constexpr bool is_convertible_v = __is_convertible_to(T, U);

template <class T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
constexpr bool is_floating_point_v =
    is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> || is_same_v<remove_cv_t<T>, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
constexpr bool is_signed_v = is_floating_point_v<T> || (is_integral_v<T> && T(-1) < T(0));
template <class T>
constexpr bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T>
constexpr bool is_pointer_v = __is_pointer(T);
template <class T>
struct make_unsigned {
  using type = __make_unsigned(T);
};
template <class T>
using make_unsigned_t = __make_unsigned(T);
template <class T>
using make_signed_t = __make_signed(T);

template <class T, size_t N>
struct array {
  T elements[N];
  SIM_FN constexpr T& operator[](size_t i) { return elements[i]; }
  SIM_FN constexpr const T& operator[](size_t i) const { return elements[i]; }
  SIM_FN constexpr T* data() { return elements; }
  SIM_FN constexpr const T* data() const { return elements; }
  SIM_FN constexpr T* begin() { return elements; }
  SIM_FN constexpr const T* begin() const { return elements; }
  SIM_FN constexpr T* end() { return elements + N; }
  SIM_FN constexpr const T* end() const { return elements + N; }
  SIM_FN constexpr size_t size() const { return N; }
};

// A value that the author says is the same in all threads; nothing checks it.
template <class T>
struct uniform {
  T value;
  uniform() = default;
  SIM_FN constexpr uniform(T v) : value(v) {}
  SIM_FN constexpr operator T() const { return value; }
};
template <class T>
SIM_FN constexpr uniform<T> make_uniform(T v) {
  return v;
}

template <class T>
struct numeric_limits {  // integers
  static constexpr bool is_signed = T(-1) < T(0);
  static constexpr int digits = sizeof(T) * 8 - is_signed;
  SIM_FN static constexpr T max() { return is_signed ? T(((T(1) << (digits - 1)) - 1) * 2 + 1) : T(~T(0)); }
  SIM_FN static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }
  SIM_FN static constexpr T lowest() { return min(); }
};
template <>
struct numeric_limits<bool> {
  static constexpr bool max() { return true; }
  static constexpr bool min() { return false; }
};
#define SIM_LIMITS(T, digits_, max_, min_, epsilon_)                        \
  template <>                                                               \
  struct numeric_limits<T> {                                                \
    static constexpr int digits = digits_;                                  \
    SIM_FN static constexpr T max() { return T(max_); }                     \
    SIM_FN static constexpr T min() { return T(min_); }                     \
    SIM_FN static constexpr T lowest() { return T(-max_); }                 \
    SIM_FN static constexpr T epsilon() { return T(epsilon_); }             \
    SIM_FN static constexpr T infinity() { return T(__builtin_inff()); }    \
    SIM_FN static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
    SIM_FN static constexpr T denorm_min() { return T(min_ * epsilon_); }   \
  };
SIM_LIMITS(float, 24, 0x1.fffffep127f, 0x1p-126f, 0x1p-23f)
SIM_LIMITS(half, 11, 65504.0f, 0x1p-14f, 0x1p-10f)
SIM_LIMITS(bfloat, 8, 0x1.fep127f, 0x1p-126f, 0x1p-7f)
#undef SIM_LIMITS

}  // namespace metal

template <class To, class From>
SIM_FN constexpr To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, from);
}
