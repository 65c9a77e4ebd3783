// What the syntax-only pass as C++ for OpenCL sees of Metal: declarations without bodies. It looks for pointers that
// change their address space; whatever else it does not understand is ignored, so nothing here need be complete.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
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
typedef half bfloat;

namespace metal {

template <class T, int N>
struct vec_of {
  typedef T type __attribute__((ext_vector_type(N)));
};
template <class T, int N>
using vec = typename vec_of<T, N>::type;
template <class Vector, class... Parts>
Vector make(Parts... parts);

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  __private vec<T, 2>& thread_elements();
};
template <class T, int Rows, int Columns>
simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value);
template <class T, class P>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, P source, ulong stride = 8, ulong origin = 0, bool transpose = false);
template <class T, class P>
void simdgroup_store(simdgroup_matrix<T, 8, 8> m, P target, ulong stride = 8, ulong origin = 0, bool transpose = false);
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a,
                                   simdgroup_matrix<B, 8, 8>& b, simdgroup_matrix<C, 8, 8>& c);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags flags);
void simdgroup_barrier(mem_flags flags);

#define SIM_SAME(name)              \
  template <class T, class... More> \
  T name(T value, More... more);
SIM_SAME(simd_shuffle)
SIM_SAME(simd_shuffle_xor)
SIM_SAME(simd_shuffle_up)
SIM_SAME(simd_shuffle_down)
SIM_SAME(simd_broadcast)
SIM_SAME(simd_sum)
SIM_SAME(simd_max)
SIM_SAME(simd_min)
SIM_SAME(simd_product)
SIM_SAME(exp)
SIM_SAME(exp2)
SIM_SAME(log)
SIM_SAME(log2)
SIM_SAME(sqrt)
SIM_SAME(rsqrt)
SIM_SAME(tanh)
SIM_SAME(fabs)
SIM_SAME(abs)
SIM_SAME(floor)
SIM_SAME(ceil)
SIM_SAME(round)
SIM_SAME(rint)
SIM_SAME(pow)
SIM_SAME(fma)
SIM_SAME(min)
SIM_SAME(max)
SIM_SAME(fmin)
SIM_SAME(fmax)
SIM_SAME(clamp)
SIM_SAME(select)
SIM_SAME(popcount)
SIM_SAME(clz)
#undef SIM_SAME

template <class T>
struct atomic {
  T value;
};
enum memory_order { memory_order_relaxed };
#define SIM_ATOMIC(name)            \
  template <class P, class... More> \
  int atomic_##name##_explicit(P place, More... more);
SIM_ATOMIC(load)
SIM_ATOMIC(store)
SIM_ATOMIC(exchange)
SIM_ATOMIC(fetch_add)
SIM_ATOMIC(fetch_sub)
SIM_ATOMIC(fetch_min)
SIM_ATOMIC(fetch_max)
SIM_ATOMIC(fetch_and)
SIM_ATOMIC(fetch_or)
SIM_ATOMIC(fetch_xor)
#undef SIM_ATOMIC

}  // namespace metal

#define SIM_VECTORS(T)           \
  using T##2 = metal::vec<T, 2>; \
  using T##3 = metal::vec<T, 3>; \
  using T##4 = metal::vec<T, 4>;
SIM_VECTORS(char)
SIM_VECTORS(uchar)
SIM_VECTORS(short)
SIM_VECTORS(ushort)
SIM_VECTORS(int)
SIM_VECTORS(uint)
SIM_VECTORS(long)
SIM_VECTORS(ulong)
SIM_VECTORS(half)
SIM_VECTORS(float)
using bfloat2 = half2;
using bfloat3 = half3;
using bfloat4 = half4;
using atomic_int = metal::atomic<int>;
using atomic_uint = metal::atomic<uint>;
using atomic_float = metal::atomic<float>;
using simdgroup_float8x8 = metal::simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = metal::simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = metal::simdgroup_matrix<half, 8, 8>;

template <class To, class From>
To as_type(From from);

namespace sim {
template <class Array, unsigned align, class Tag>
__local Array& threadgroup_alloc(const __constant char* name, Tag tag);
}
