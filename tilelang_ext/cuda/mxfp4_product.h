// Products of tokens and MXFP4 weights on Hopper, for all of K, by all threads of a block. See mxfp4_product.py.
//
//     C[i, j] = sum over k of A[i, k] * 2^(scale[j, k / 32] - 127) * W[j, k]
//
// Weights are the left operand of the matrix unit: each thread decodes its part of them into registers. A thread's rows
// of 16 are 2 g and 2 g + 1 where the instruction has g and g + 8, so that it holds neighbours of C. With lane = 4 g +
// t.
#include <tl_templates/cuda/instruction/wgmma.h>

namespace tilelang_ext {

// A tile of each operand in global memory: its first element, bytes from row to row, and the rows that exist.
struct Mxfp4Operands {
  const char *a, *w;
  const unsigned char* scale;
  long long a_stride, w_stride, scale_stride;
  int a_rows, w_rows, K;

  __device__ __forceinline__ Mxfp4Operands(const void* a, const void* w, const void* scale, long long a_stride,
                                           long long w_stride, long long scale_stride, int a_rows, int w_rows, int K)
      : a(static_cast<const char*>(a)),
        w(static_cast<const char*>(w)),
        scale(static_cast<const unsigned char*>(scale)),
        a_stride(a_stride),
        w_stride(w_stride),
        scale_stride(scale_stride),
        a_rows(a_rows),
        w_rows(w_rows),
        K(K) {}
};

__device__ __forceinline__ unsigned select_bytes(unsigned low, unsigned high, unsigned selectors) {
  return __byte_perm(low, high, selectors);
}

__device__ __forceinline__ unsigned times_bfloat16(unsigned pair, unsigned factors) {
  unsigned product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(factors));
  return product;
}

// Two codes as bfloat16 whose lowest exponent bits and highest mantissa bit are the code's are 2^-126 of their value.
// Times a power of two that contains 2^126 they are exact, for subnormal codes too. That power is finite for scale
// bytes up to 128.
constexpr unsigned kMagnitudes = 0x01c001c0, kSigns = 0x80008000, kLargestFolded = 128;

__device__ __forceinline__ unsigned both(unsigned bfloat16_exponent) { return bfloat16_exponent * 0x00800080; }

template <bool kFolds>
__device__ __forceinline__ unsigned scaled(unsigned bits, unsigned scale) {
  if constexpr (kFolds) {
    return times_bfloat16(bits, both(scale + 126));
  } else {
    // 2^(scale - 127), of which 2^-127 is subnormal, and NaN for 255: both have the highest bit of the mantissa.
    const unsigned power = both(scale) | (((scale + 1) & 0xff) < 2 ? 0x00400040 : 0);
    return times_bfloat16(times_bfloat16(bits, both(253)), power);
  }
}

__device__ __forceinline__ bool any_larger(unsigned scales) {  // than kLargestFolded, of four bytes
  return (scales & ((scales & 0x7f7f7f7f) + 0x7f7f7f7f) & 0x80808080) != 0;
}

__device__ __forceinline__ void copy_16(unsigned shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(inside ? 16 : 0));
}

__device__ __forceinline__ void copy_4(unsigned shared, const void* global, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(inside ? 4 : 0));
}

template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

__device__ __forceinline__ void publish_copies() {  // to the matrix unit, which reads through the async proxy
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kRegisters>
__device__ __forceinline__ void fence_registers(float (&registers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// A tile of kTokens by kRows by warpgroups of kThreads, 128 bytes of each token a step. kFp8 says what tokens are.
template <tl::DataType kType, int kTokens, int kRows, int kThreads, int kStages>
struct Mxfp4Wgmma {
  static constexpr bool kFp8 = kType != tl::DataType::kBFloat16;
  static constexpr int kWarpgroups = kThreads / 128, kBands = kRows / 64 / kWarpgroups;
  static constexpr int kStep = kFp8 ? 128 : 64;     // of K
  static constexpr int kSums = kTokens / 2;         // of a thread and band
  static constexpr int kRowBytes = kFp8 ? 80 : 32;  // of weights in a stage; padded against bank conflicts
  static constexpr int kChunks = kStep / 2 / 16;    // copies of a row of weights
  static constexpr int kTokenBytes = kTokens * 128, kWeightBytes = kRows * kRowBytes;
  static constexpr int kScaleStages = kFp8 ? kStages : kStages / 2;  // four scales of a row each
  static constexpr int kBarriers =
      kStages * (kTokenBytes + kWeightBytes) + kScaleStages * kRows * 4;  // their first byte
  static constexpr int kDrift = 1;          // steps that a warpgroup may be ahead of another
  static constexpr int kLargestShift = 12;  // 6 * 2^(12 - 6) is 384; 448 is the largest number of E4M3
  static_assert(kStages % 2 == 0 || kFp8);

  const Mxfp4Operands& p;
  unsigned shared;
  const char *a, *w, *scale;
  unsigned a_to, w_to, scale_to;
  int thread, warpgroup, warp, g, t;

  __device__ __forceinline__ Mxfp4Wgmma(const Mxfp4Operands& operands, unsigned shared) : p(operands), shared(shared) {
    thread = threadIdx.x, warpgroup = thread / 128, warp = thread % 128 / 32, g = thread % 32 / 4, t = thread % 4;
    const int row = thread / 8, column = thread % 8;
    a = p.a + row * p.a_stride + column * 16;
    a_to = shared + row * 128 + ((column ^ (row % 8)) * 16);
    w = p.w + thread / kChunks * p.w_stride + thread % kChunks * 16;
    w_to = shared + kStages * kTokenBytes + slot(thread / kChunks) * kRowBytes + thread % kChunks * 16;
    scale = reinterpret_cast<const char*>(p.scale) + thread * p.scale_stride;
    scale_to = shared + kStages * (kTokenBytes + kWeightBytes) + thread * 4;
  }

  // Rows 2 g of 16 come first, then rows 2 g + 1: eight neighbours are read at once.
  static __device__ __forceinline__ int slot(int row) { return row / 16 * 16 + row % 2 * 8 + row % 16 / 2; }

  // Begins to copy a step; what lies outside is zeros. `kInside` says that nothing does.
  template <bool kInside>
  __device__ __forceinline__ void load_rows(int step, int stage) {
    const char* from = a + static_cast<long long>(step) * 128;
#pragma unroll
    for (int i = 0; i < (kTokens * 8 + kThreads - 1) / kThreads; ++i) {
      const int row = i * (kThreads / 8) + thread / 8;
      if (kTokens * 8 % kThreads == 0 || row < kTokens)
        copy_16(a_to + stage * kTokenBytes + i * (kThreads * 16), from + i * (kThreads / 8) * p.a_stride,
                kInside || row < p.a_rows);
    }
    from = w + static_cast<long long>(step) * (kStep / 2);
#pragma unroll
    for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
      const int row = i * (kThreads / kChunks) + thread / kChunks;
      if (kRows * kChunks % kThreads == 0 || row < kRows)
        copy_16(w_to + stage * kWeightBytes + i * (kThreads / kChunks) * kRowBytes,
                from + i * (kThreads / kChunks) * p.w_stride, kInside || row < p.w_rows);
    }
    if (kFp8 || step % 2 == 0) {
      from = scale + (kFp8 ? step : step / 2) * 4;
#pragma unroll
      for (int i = 0; i < (kRows + kThreads - 1) / kThreads; ++i) {
        const int row = i * kThreads + thread;
        if (row < kRows)
          copy_4(scale_to + (kFp8 ? stage : stage / 2) * (kRows * 4) + i * kThreads * 4,
                 from + i * kThreads * p.scale_stride, kInside || row < p.w_rows);
      }
    }
  }

  __device__ __forceinline__ void load(int step, int stage) {
    if (p.a_rows >= kTokens && p.w_rows >= kRows)
      load_rows<true>(step, stage);
    else
      load_rows<false>(step, stage);
  }

  __device__ __forceinline__ unsigned row_of(int band) const { return (warpgroup * kBands + band) * 64 + warp * 16; }

  __device__ __forceinline__ uint2 scales_of(int band, int stage) const {
    uint2 scales;
    const unsigned from = shared + kStages * (kTokenBytes + kWeightBytes) + (kFp8 ? stage : stage / 2) * (kRows * 4);
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(scales.x), "=r"(scales.y)
                 : "r"(from + (row_of(band) + 2 * g) * 4));
    return scales;
  }

  // A quarter of a band of a step, 16 of K: a thread's four registers of the left operand.
  template <bool kFolds>
  __device__ __forceinline__ void decode_bfloat16(const unsigned (&codes)[2][2], uint2 scales, int at, unsigned* out) {
    const unsigned byte = 0x4440 | t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        // Codes 2 t and 2 t + 1 of eight: a byte, whose nibbles go to both halves.
        const unsigned pair = select_bytes(codes[row][i], 0, byte);
        const unsigned bits = ((pair * 0x00040040) & kMagnitudes) | ((pair * 0x01001000) & kSigns);
        out[i * 2 + row] = scaled<kFolds>(bits, select_bytes(row ? scales.y : scales.x, 0, 0x4440 | at));
      }
    }
  }

  __device__ __forceinline__ unsigned codes_of(int band, int stage) const {
    return shared + kStages * kTokenBytes + stage * kWeightBytes + (row_of(band) + g) * kRowBytes;
  }

  __device__ __forceinline__ void decode_bfloat16(unsigned from, uint2 scales, bool folds, int half, int quarter,
                                                  unsigned* out) {
    unsigned codes[2][2];
#pragma unroll
    for (int row = 0; row < 2; ++row)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(codes[row][0]), "=r"(codes[row][1])
                   : "r"(from + row * 8 * kRowBytes + quarter * 8));
    if (folds)
      decode_bfloat16<true>(codes, scales, half * 2 + quarter / 2, out);
    else
      decode_bfloat16<false>(codes, scales, half * 2 + quarter / 2, out);
  }

  // E4M3 of code * 2^(shift - 6), for a shift of 1 to kLargestShift: the magnitudes select bytes of a table of eight.
  // 32 of K.
  __device__ __forceinline__ void decode_fp8(unsigned from, uint2 shifts, int group, unsigned* out) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const unsigned shift = select_bytes(row ? shifts.y : shifts.x, 0, 0x4440 | group);
      const unsigned low = shift * 0x08080800 + 0x0c080000, high = shift * 0x08080808 + 0x1c181410;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        unsigned short codes;
        asm volatile("ld.shared.u16 %0, [%1];"
                     : "=h"(codes)
                     : "r"(from + row * 8 * kRowBytes + group * 16 + part * 8 + t * 2));
        const unsigned four = codes;
        const unsigned signs = select_bytes(0x00008000, 0, (four >> 3) & 0x1111);
        out[part * 2 + row] = select_bytes(low, high, four & 0x7777) | signs;
      }
    }
  }

  // What all quarters of a band need: scales, shifts for fp8; whether they fold.
  struct Decoder {
    uint2 scales[kBands];
    bool folds[kBands];
  };

  __device__ __forceinline__ void begin_decode(int stage, int half, const int (&base)[kBands][2], Decoder& decoder) {
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      uint2& scales = decoder.scales[band];
      scales = scales_of(band, stage);
      if constexpr (kFp8)
        scales.x -= base[band][0] * 0x01010101, scales.y -= base[band][1] * 0x01010101;
      else
        decoder.folds[band] =
            !any_larger(half ? select_bytes(scales.x, scales.y, 0x7632) : select_bytes(scales.x, scales.y, 0x5410));
    }
  }

  __device__ __forceinline__ void decode_quarter(int stage, int half, int quarter, const Decoder& decoder,
                                                 unsigned (&left)[kBands][16]) {
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      if constexpr (kFp8)
        decode_fp8(codes_of(band, stage), decoder.scales[band], quarter, &left[band][quarter * 4]);
      else
        decode_bfloat16(codes_of(band, stage), decoder.scales[band], decoder.folds[band], half, quarter,
                        &left[band][quarter * 4]);
    }
  }

  __device__ __forceinline__ unsigned long long descriptor(int stage) const {  // K-major, rows of 128 bytes, swizzled
    const unsigned long long of_rows_of_eight = 1024 >> 4, swizzle_128 = 1;
    return ((shared + stage * kTokenBytes) & 0x3ffff) >> 4 | 1ull << 16 | of_rows_of_eight << 32 | swizzle_128 << 62;
  }

  template <int kN>
  static __device__ __forceinline__ void multiply(const unsigned* left, unsigned long long right, float* sums,
                                                  bool add) {
    tl::wgmma_rs<kFp8 ? tl::DataType::kFloat8_e4m3 : kType, kType, tl::DataType::kFloat32, 64, kN, kStep / 4, false,
                 false>(left, right, reinterpret_cast<uint32_t*>(sums), add);
  }

  __device__ __forceinline__ unsigned full(int stage) const { return shared + kBarriers + stage * 8; }
  __device__ __forceinline__ unsigned empty(int stage) const { return shared + kBarriers + (kStages + stage) * 8; }

  __device__ __forceinline__ void initialize_barriers() {
    if (thread == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(full(stage)), "r"(kThreads));
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(empty(stage)), "r"(kThreads / 32));
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void invalidate_barriers() {
    __syncthreads();
    if (thread < 2 * kStages) asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(full(0) + thread * 8) : "memory");
    __syncthreads();
  }

  static __device__ __forceinline__ void wait(unsigned barrier, unsigned phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            barrier),
        "r"(phase)
        : "memory");
  }

  __device__ __forceinline__ void begin(int step, int stage) {  // copies whose end the stage's barrier waits for
    load(step, stage);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full(stage)) : "memory");
  }

  __device__ __forceinline__ void release(int stage) {
    if (thread % 32 == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(empty(stage)) : "memory");
  }

  __device__ __forceinline__ void run(float (&sums)[kBands][kSums], const int (&base)[kBands][2]) {
    const int steps = p.K / kStep;
    constexpr int kAhead = kStages - 1 - kDrift;  // steps whose copies are under way or done
    unsigned left[2][kBands][16];
    initialize_barriers();
#pragma unroll
    for (int step = 0; step < kAhead; ++step)
      if (step < steps) begin(step, step);
    wait(full(0), 0);
    Decoder decoder;
    begin_decode(0, 0, base, decoder);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) decode_quarter(0, 0, quarter, decoder, left[0]);
    // Stages and rounds: of this step, and of the one whose copies begin.
    int stage = 0, filled = kAhead;
    unsigned phase = 0, filled_phase = 1;
    // No proxy fence stands between a stage's copies and its products, since it is a MEMBAR in each step: the bytes of
    // cp.async are in shared memory, where the matrix unit reads them, when the stage's barrier is complete.
    // A step multiplies what has been decoded and decodes the next. The matrix unit takes registers as it begins each
    // product, and the warps wait for that: it is the other warpgroup that decodes meanwhile, so they do not wait for
    // each other.
#pragma unroll 1
    for (int first = 0; first < steps; first += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int step = first + half;
        if (kFp8 && half && step >= steps) break;
#pragma unroll
        for (int band = 0; band < kBands; ++band) fence_registers(sums[band]);
        cute::warpgroup_arrive();
        const unsigned long long right = descriptor(__shfl_sync(0xffffffff, stage, 0));
        const int before = stage == 0 ? kStages - 1 : stage - 1, next = stage == kStages - 1 ? 0 : stage + 1;
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int band = 0; band < kBands; ++band)
            multiply<kTokens>(&left[half][band][4 * k], right + 2 * k, sums[band], true);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        if (step > 0) release(before);
        if (step + kAhead < steps) {
          wait(empty(filled), filled_phase);
          begin(step + kAhead, filled);
        }
        if (++filled == kStages) filled = 0, filled_phase ^= 1;
        if (step + 1 < steps) {
          wait(full(next), next == 0 ? phase ^ 1 : phase);
          begin_decode(next, 1 - half, base, decoder);
#pragma unroll
          for (int quarter = 0; quarter < 4; ++quarter)
            decode_quarter(next, 1 - half, quarter, decoder, left[1 - half]);
        }
        stage = next;
        if (stage == 0) phase ^= 1;
      }
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int band = 0; band < kBands; ++band) fence_registers(sums[band]);
    invalidate_barriers();
  }

  // Any scales: codes without them, and each product of 32 of K is multiplied by its own.
  __device__ __forceinline__ void run_by_groups(float (&sums)[kBands][kSums]) {
    constexpr int kPart = kTokens % 16 == 0 ? 16 : 8;
#pragma unroll 1
    for (int step = 0; step < p.K / kStep; ++step) {
      load(step, 0);
      commit_copies();
      wait_for_copies<0>();
      publish_copies();
      __syncthreads();
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        unsigned left[16];
#pragma unroll
        for (int group = 0; group < 4; ++group)
          decode_fp8(codes_of(band, 0), make_uint2(0x06060606, 0x06060606), group, &left[group * 4]);
        const uint2 scales = scales_of(band, 0);
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          float factor[2];
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            const unsigned byte = (row ? scales.y : scales.x) >> (8 * group) & 0xff;
            factor[row] = __uint_as_float(byte == 0 ? 0x00400000 : byte == 255 ? 0x7fc00000 : byte << 23);
          }
#pragma unroll
          for (int part = 0; part < kTokens / kPart; ++part) {
            float products[kPart / 2] = {};
            fence_registers(products);
            cute::warpgroup_arrive();
            multiply<kPart>(&left[4 * group], descriptor(0) + 2 * group + part * (kPart * 128 >> 4), products, true);
            cute::warpgroup_commit_batch();
            cute::warpgroup_wait<0>();
            fence_registers(products);
#pragma unroll
            for (int i = 0; i < kPart / 2; ++i) sums[band][part * (kPart / 2) + i] += products[i] * factor[i / 2 % 2];
          }
        }
      }
      __syncthreads();
    }
  }

  // The shift of a row's scales that makes the largest kLargestShift, for rows 2 g and 2 g + 1; false if a smallest is
  // then below 1.
  __device__ __forceinline__ bool find_bases(int (&base)[kBands][2]) {
    bool fits = true;
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int at = row_of(band) + 2 * g + row;
        unsigned largest = 0, smallest = 0xffffffff;
        if (at < p.w_rows)
          for (int group = t; group < p.K / 128; group += 4) {
            const unsigned scales = __ldg(reinterpret_cast<const unsigned*>(p.scale + at * p.scale_stride + group * 4));
            largest = __vmaxu4(largest, scales), smallest = __vminu4(smallest, scales);
          }
        else
          smallest = 0;
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
          largest = __vmaxu4(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
          smallest = __vminu4(smallest, __shfl_xor_sync(0xffffffff, smallest, lanes));
        }
        largest = __vmaxu4(largest, largest >> 16), smallest = __vminu4(smallest, smallest >> 16 | 0xffff0000);
        largest = max(largest & 0xff, largest >> 8 & 0xff), smallest = min(smallest & 0xff, smallest >> 8 & 0xff);
        base[band][row] = static_cast<int>(largest) - kLargestShift;
        fits = fits && largest < 255 && static_cast<int>(smallest) > base[band][row];
      }
    }
    return __syncthreads_and(fits);
  }

  __device__ __forceinline__ void product(float* C) {
    float sums[kBands][kSums];
    int base[kBands][2];
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[band][i] = 0;
    if constexpr (kFp8) {
      if (find_bases(base)) {
        run(sums, base);
#pragma unroll
        for (int band = 0; band < kBands; ++band)
#pragma unroll
          for (int i = 0; i < kSums; ++i) sums[band][i] = ldexpf(sums[band][i], base[band][i / 2 % 2] + 6 - 127);
      } else {
        run_by_groups(sums);
      }
    } else {
      run(sums, base);
    }
    // Neighbours in a row of C lie side by side: the layout of mxfp4_product.py.
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int i = 0; i < kSums; ++i) C[band * kSums + i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = sums[band][i];
  }
};

template <tl::DataType kType, int kTokens, int kRows, int kThreads, int kStages, typename... Operands>
__device__ __forceinline__ void mxfp4_wgmma(float* C, void* workspace, Operands... tiles) {
  const Mxfp4Operands operands(tiles...);
  const unsigned shared = (static_cast<unsigned>(__cvta_generic_to_shared(workspace)) + 1023) & ~1023u;
  Mxfp4Wgmma<kType, kTokens, kRows, kThreads, kStages>(operands, shared).product(C);
}

// Up to 16 tokens: warps split K, and read weights, 16 bytes of a row a lane, and tokens straight from global memory.
// The sums of split s lie in sums[s][token][row].
template <int kTokens, int kRows, int kThreads, typename... Operands>
__device__ __forceinline__ void mxfp4_mma(float* sums, Operands... tiles) {
  const Mxfp4Operands p(tiles...);
  constexpr int kWarps = kThreads / 32;
  constexpr int kBands = kRows % 32 == 0 && kRows / 32 <= kWarps ? 2 : 1;  // of 16 rows, of a warp
  constexpr int kWarpsOfRows = kRows / 16 / kBands, kSplits = kWarps / kWarpsOfRows;
  constexpr int kColumns = (kTokens + 7) / 8;
  constexpr int kAhead = 2;  // blocks of 128 of K, whose codes are under way together
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int first_row = warp % kWarpsOfRows * kBands * 16, split = warp / kWarpsOfRows;
  const int blocks = p.K / 128;
  float acc[kBands][kColumns][4] = {};
#pragma unroll 1
  for (int first = split * kAhead; first < blocks; first += kSplits * kAhead) {
    uint4 codes[kAhead][kBands][2];
    unsigned scales[kAhead][kBands][2];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead)
#pragma unroll
      for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int at = first_row + band * 16 + 2 * g + row, block = first + ahead;
          codes[ahead][band][row] = make_uint4(0, 0, 0, 0), scales[ahead][band][row] = 0;
          if (at < p.w_rows && block < blocks) {
            const void* from = p.w + at * p.w_stride + block * 64 + t * 16;
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(codes[ahead][band][row].x), "=r"(codes[ahead][band][row].y),
                           "=r"(codes[ahead][band][row].z), "=r"(codes[ahead][band][row].w)
                         : "l"(from));
            scales[ahead][band][row] = __ldg(p.scale + at * p.scale_stride + block * 4 + t);
          }
        }
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      uint4 tokens[kColumns][4];
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          tokens[column][part] = make_uint4(0, 0, 0, 0);
          if (column * 8 + g < min(kTokens, p.a_rows) && first + ahead < blocks)
            tokens[column][part] = __ldg(reinterpret_cast<const uint4*>(p.a + (column * 8 + g) * p.a_stride +
                                                                        (first + ahead) * 256 + t * 64 + part * 16));
        }
      bool folds = true;
#pragma unroll
      for (int band = 0; band < kBands; ++band)
        folds &= max(scales[ahead][band][0], scales[ahead][band][1]) <= kLargestFolded;
      const bool all_fold = __all_sync(0xffffffff, folds);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        unsigned left[kBands][8];
#pragma unroll
        for (int band = 0; band < kBands; ++band)
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            const uint4& four = codes[ahead][band][row];
            const unsigned word = part == 0 ? four.x : part == 1 ? four.y : part == 2 ? four.z : four.w;
            const unsigned scale = scales[ahead][band][row];
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {  // codes `pair` and `pair` + 4
              const unsigned magnitudes = pair < 2 ? word << (6 - 4 * pair) : word >> (4 * pair - 6);
              const unsigned bits = (magnitudes & kMagnitudes) | ((word << (12 - 4 * pair)) & kSigns);
              left[band][pair * 2 + row] = bits;
            }
            if (all_fold)
#pragma unroll
              for (int pair = 0; pair < 4; ++pair)
                left[band][pair * 2 + row] = scaled<true>(left[band][pair * 2 + row], scale);
            else
#pragma unroll
              for (int pair = 0; pair < 4; ++pair)
                left[band][pair * 2 + row] = scaled<false>(left[band][pair * 2 + row], scale);
          }
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const uint4& eight = tokens[column][part];
          const unsigned right[4] = {select_bytes(eight.x, eight.z, 0x5410), select_bytes(eight.x, eight.z, 0x7632),
                                     select_bytes(eight.y, eight.w, 0x5410), select_bytes(eight.y, eight.w, 0x7632)};
#pragma unroll
          for (int band = 0; band < kBands; ++band)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float (&c)[4] = acc[band][column];
              const unsigned* a = &left[band][half * 4];
              asm volatile(
                  "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                  "{%0, %1, %2, %3};"
                  : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(right[half * 2]), "r"(right[half * 2 + 1]));
            }
        }
      }
    }
  }
#pragma unroll
  for (int band = 0; band < kBands; ++band)
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = column * 8 + t * 2 + i % 2, row = first_row + band * 16 + 2 * g + i / 2;
        if (token < kTokens) sums[(split * kTokens + token) * kRows + row] = acc[band][column][i];
      }
  __syncthreads();
}

}  // namespace tilelang_ext
