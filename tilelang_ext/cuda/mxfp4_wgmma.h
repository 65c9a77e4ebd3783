// Products of tokens and MXFP4 weights by warpgroups on Hopper: what consumers and producer do for a tile, all of K.
//
//     C[i, j] = sum over k of A[i, k] * 2^(scale[j, k / 32] - 127) * W[j, k]
//
// Weights are the left operand of the matrix unit: each thread decodes its part of them into registers. A thread's rows
// of 16 are 2 g and 2 g + 1 where the instruction has g and g + 8, so that it holds neighbours of C. With lane = 4 g +
// t. See mxfp4_roles.py for who calls what.
namespace tilelang_ext {

// A ring of stages of a tile of kTokens by kRows, 128 bytes of each token a step. kType says what tokens are.
template <tl::DataType kType, int kTokens, int kRows, int kStages>
struct Mxfp4Ring {
  static constexpr bool kFp8 = kType != tl::DataType::kBFloat16;
  static constexpr int kStep = kFp8 ? 128 : 64;  // of K
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kRowBytes = kStep / 2;  // of codes in a stage, swizzled by their number

  const unsigned char *tokens, *codes;  // of the first stage
  unsigned* scales;                     // of four groups of each row, a stage after the other
  Barrier *full, *empty;
  int *stage, *parity;  // where a role is
  int* begun;           // whether consumers have taken turns yet

  __device__ __forceinline__ Mxfp4Ring(const void* tokens, const void* codes, void* scales, Barrier* full,
                                       Barrier* empty, int* state)
      : tokens(static_cast<const unsigned char*>(tokens)),
        codes(static_cast<const unsigned char*>(codes)),
        scales(static_cast<unsigned*>(scales)),
        full(full),
        empty(empty),
        stage(state),
        parity(state + 1),
        begun(state + 2) {}

  __device__ __forceinline__ int before() const { return *stage == 0 ? kStages - 1 : *stage - 1; }

  __device__ __forceinline__ void advance() const {
    if (++*stage == kStages) *stage = 0, *parity ^= 1;
  }

  __device__ __forceinline__ void wait_until_full() const {
    full[*stage].wait(*parity);
    keep_order_of_memory();
  }

  __device__ __forceinline__ void release(int stage) const {
    keep_order_of_memory();
    if (threadIdx.x % 32 == 0) empty[stage].arrive();
  }
};

// Scales of MXFP4 rows in global memory: bytes from row to row, and the rows that exist.
struct Mxfp4Scales {
  const unsigned char* first;
  long long stride;
  int rows;
};

template <tl::DataType kType, int kTokens, int kRows, int kWarpgroups, int kStages>
struct Mxfp4Consumer {
  using Ring = Mxfp4Ring<kType, kTokens, kRows, kStages>;
  static constexpr bool kFp8 = Ring::kFp8;
  static constexpr int kBands = kRows / 64 / kWarpgroups;
  static constexpr int kSums = kTokens / 2;  // of a thread and band
  static constexpr int kLargestShift = 12;   // 6 * 2^(12 - 6) is 384; 448 is the largest number of E4M3

  const Ring& ring;
  int warpgroup, warp, g, t;
  tl::GmmaDescriptor right;

  __device__ __forceinline__ explicit Mxfp4Consumer(const Ring& ring) : ring(ring) {
    const int thread = threadIdx.x;
    warpgroup = thread / 128, warp = thread % 128 / 32, g = thread % 32 / 4, t = thread % 4;
    tl::initialize_wgmma_descriptor<1, 1, 64>(right, const_cast<unsigned char*>(ring.tokens));
  }

  __device__ __forceinline__ int row_of(int band) const { return (warpgroup * kBands + band) * 64 + warp * 16; }

  __device__ __forceinline__ uint2 scales_of(int band) const {
    return *reinterpret_cast<const uint2*>(ring.scales + *ring.stage * kRows + row_of(band) + 2 * g);
  }

  // 16 bytes of the codes of row 2 g + row of a band.
  __device__ __forceinline__ uint4 codes_of(int band, int row, int part) const {
    const int swizzled = kFp8 ? part ^ (g & 3) : part ^ (g >> 1 & 1);
    return *reinterpret_cast<const uint4*>(
        ring.codes + (*ring.stage * kRows + row_of(band) + 2 * g + row) * Ring::kRowBytes + swizzled * 16);
  }

  // 64 of K of a band: sixteen registers of the left operand. Of each eight codes a lane has 2 t and 2 t + 1, a byte,
  // whose nibbles go to both halves of a register.
  template <bool kFolds>
  __device__ __forceinline__ void decode_bfloat16(int band, uint2 scales, int half, unsigned* left) const {
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int part = 0; part < 2; ++part) {  // a group of 32
        const uint4 codes = codes_of(band, row, part);
        const unsigned scale = byte_of(row ? scales.y : scales.x, half * 2 + part);
        const unsigned power = kFolds ? scale * 0x00800080 + 126 * 0x00800080 : power_of(scale);
        const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const unsigned pair = byte_of(words[word], t);
          unsigned bits = ((pair * 0x00040040) & kMagnitudes) | ((pair * 0x01001000) & kSigns);
          if (!kFolds) bits = times_bfloat16(bits, both(253));
          left[(part * 2 + word / 2) * 4 + word % 2 * 2 + row] = times_bfloat16(bits, power);
        }
      }
  }

  // E4M3 of code * 2^(shift - 6), for a shift of 1 to kLargestShift: the magnitudes select bytes of a table of eight,
  // and a selector with its sign bit gives the highest bit of a byte eight times. 128 of K of a band.
  __device__ __forceinline__ void decode_fp8(int band, uint2 shifts, unsigned* left) const {
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        const uint4 codes = codes_of(band, row, group);
        const unsigned shift = byte_of(row ? shifts.y : shifts.x, group);
        const unsigned low = shift * 0x08080800 + 0x0c080000, high = shift * 0x08080808 + 0x1c181410;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Codes 4 t to 4 t + 3 of sixteen: two bytes of eight.
          const unsigned four =
              select_bytes(half ? codes.z : codes.x, half ? codes.w : codes.y, (2 * t + 1) << 4 | 2 * t);
          const unsigned signs = select_bytes(0x80808080, 0x80808080, four) & 0x01010101;
          left[group * 4 + half * 2 + row] = signs * 128 + select_bytes(low, high, four & 0x7777);
        }
      }
  }

  // What the stage holds, to the left operand.
  __device__ __forceinline__ void decode(int half, const int (&base)[kBands][2], unsigned (&left)[kBands][16]) const {
    uint2 scales[kBands];
    bool folds = true;
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      scales[band] = scales_of(band);
      if constexpr (kFp8)
        scales[band].x -= base[band][0] * 0x01010101, scales[band].y -= base[band][1] * 0x01010101;
      else
        folds = folds && !any_larger(select_bytes(scales[band].x, scales[band].y, half ? 0x7632 : 0x5410));
    }
    if constexpr (kFp8) {
#pragma unroll
      for (int band = 0; band < kBands; ++band) decode_fp8(band, scales[band], left[band]);
    } else if (__all_sync(0xffffffff, folds)) {
#pragma unroll
      for (int band = 0; band < kBands; ++band) decode_bfloat16<true>(band, scales[band], half, left[band]);
    } else {
#pragma unroll
      for (int band = 0; band < kBands; ++band) decode_bfloat16<false>(band, scales[band], half, left[band]);
    }
  }

  template <int kN>
  static __device__ __forceinline__ void multiply(const unsigned* left, unsigned long long right, float* sums,
                                                  bool add) {
    tl::wgmma_rs<kFp8 ? tl::DataType::kFloat8_e4m3 : kType, kType, tl::DataType::kFloat32, 64, kN, Ring::kStep / 4,
                 false, false, 1, 1>(left, right, reinterpret_cast<uint32_t*>(sums), add);
  }

  // Warpgroups take turns to begin the products of a step. The matrix unit takes registers as it begins each product,
  // and the warps wait for that: if it took products of all warpgroups in turn, all would decode at the same time, and
  // it would wait. Products of bfloat16 are bound by the GPU's power instead.
  static constexpr bool kTakesTurns = kFp8 && kWarpgroups > 1;

  __device__ __forceinline__ void begin_turn() const {
    if constexpr (kTakesTurns) wait_for_turn(warpgroup);
  }

  __device__ __forceinline__ void end_turn() const {
    if constexpr (kTakesTurns) give_turn_to(warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1);
  }

  // A step multiplies what has been decoded and decodes the next.
  __device__ __forceinline__ void run(int steps, const int (&base)[kBands][2], float (&sums)[kBands][kSums]) {
    unsigned left[2][kBands][16];
    ring.wait_until_full();
    decode(0, base, left[0]);
#pragma unroll 1
    for (int first = 0; first < steps; first += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int step = first + half;
        if (half && step >= steps) break;
#pragma unroll
        for (int band = 0; band < kBands; ++band) tl::warpgroup_fence_operand(sums[band], kSums);
        begin_turn();
        tl::warpgroup_arrive();
        // All threads have the same stage; from a shuffle the compiler sees it, and keeps descriptors in uniform
        // registers.
        const int stage = __shfl_sync(0xffffffff, *ring.stage, 0);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int band = 0; band < kBands; ++band)
            multiply<kTokens>(&left[half][band][4 * k], uint64_t(right + ((stage * Ring::kTokenBytes + k * 32) >> 4)),
                              sums[band], true);
        tl::warpgroup_commit_batch();
        end_turn();
        tl::wait_wgmma<1>();
        if (step > 0) ring.release(ring.before());
        ring.advance();
        if (step + 1 < steps) {
          ring.wait_until_full();
          decode(1 - half, base, left[1 - half]);
        }
      }
    }
    tl::wait_wgmma<0>();
#pragma unroll
    for (int band = 0; band < kBands; ++band) tl::warpgroup_fence_operand(sums[band], kSums);
    ring.release(ring.before());
  }

  // Any scales of fp8: codes without them, and each product of 32 of K is multiplied by its own.
  __device__ __forceinline__ void run_by_groups(int steps, float (&sums)[kBands][kSums]) {
    constexpr int kPart = kTokens % 16 == 0 ? 16 : 8;
    // The same registers for each: the compiler would else begin many products before it adds one, and spill.
    float products[kPart / 2] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ring.wait_until_full();
      const int stage = __shfl_sync(0xffffffff, *ring.stage, 0);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        unsigned left[16];
        decode_fp8(band, make_uint2(0x06060606, 0x06060606), left);
        const uint2 scales = scales_of(band);
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          const float factors[2] = {factor_of(scales.x >> (8 * group) & 0xff),
                                    factor_of(scales.y >> (8 * group) & 0xff)};
#pragma unroll
          for (int part = 0; part < kTokens / kPart; ++part) {
            tl::warpgroup_fence_operand(products, kPart / 2);
            tl::warpgroup_arrive();
            multiply<kPart>(&left[4 * group],
                            uint64_t(right + ((stage * Ring::kTokenBytes + part * kPart * 128 + group * 32) >> 4)),
                            products, false);
            tl::warpgroup_commit_batch();
            tl::wait_wgmma<0>();
            tl::warpgroup_fence_operand(products, kPart / 2);
#pragma unroll
            for (int i = 0; i < kPart / 2; ++i) sums[band][part * (kPart / 2) + i] += products[i] * factors[i / 2 % 2];
          }
        }
      }
      ring.release(stage);
      ring.advance();
      begin_turn();
      end_turn();
    }
  }

  static __device__ __forceinline__ float factor_of(unsigned scale) {  // 2^(scale - 127), NaN for 255
    return __uint_as_float(scale == 0 ? 0x00400000 : scale == 255 ? 0x7fc00000 : scale << 23);
  }

  // What a scale is larger than the shift for it, so that a row's largest shift is kLargestShift, for rows 2 g and 2 g
  // + 1; false if a smallest is then below 1, or a scale is NaN.
  __device__ __forceinline__ bool find_bases(const Mxfp4Scales& scales, int steps, int (&base)[kBands][2]) const {
    constexpr int kAhead = 8;  // words that are under way together
    unsigned largest[kBands][2], smallest[kBands][2];
    bool fits = true;
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) largest[band][row] = 0, smallest[band][row] = 0xffffffff;
#pragma unroll 1
    for (int first = t; first < steps; first += 4 * kAhead) {
#pragma unroll
      for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int at = row_of(band) + 2 * g + row;
          const unsigned char* from = scales.first + at * scales.stride;
          unsigned words[kAhead] = {};
          if (at < scales.rows)
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
              words[i] = *reinterpret_cast<const unsigned*>(from + min(first + 4 * i, steps - 1) * 4);
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            largest[band][row] = __vmaxu4(largest[band][row], words[i]);
            smallest[band][row] = __vminu4(smallest[band][row], words[i]);
          }
        }
    }
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        unsigned most = largest[band][row], least = smallest[band][row];
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
          most = __vmaxu4(most, __shfl_xor_sync(0xffffffff, most, lanes));
          least = __vminu4(least, __shfl_xor_sync(0xffffffff, least, lanes));
        }
        most = __vmaxu4(most, most >> 16), least = __vminu4(least, least >> 16 | 0xffff0000);
        most = max(most & 0xff, most >> 8 & 0xff), least = min(least & 0xff, least >> 8 & 0xff);
        base[band][row] = static_cast<int>(most) - kLargestShift;
        fits = fits && most < 255 && static_cast<int>(least) > base[band][row];
      }
    return all_of_warpgroup(warpgroup, fits);
  }

  __device__ __forceinline__ void product(const Mxfp4Scales& scales, int steps, float* C) {
    float sums[kBands][kSums];
    int base[kBands][2] = {};
    if (kTakesTurns && warpgroup + 1 == kWarpgroups && *ring.begun == 0) give_turn_to(0);
    *ring.begun = 1;
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[band][i] = 0;
    if constexpr (kFp8) {
      if (find_bases(scales, steps, base)) {
        run(steps, base, sums);
#pragma unroll
        for (int band = 0; band < kBands; ++band)
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            // First what is below the normal numbers: these sums are far above them, so it is exact.
            const int exponent = base[band][i / 2 % 2] + 6, below = min(exponent - 1, 0);
            sums[band][i] = sums[band][i] * factor_of(127 + below) * factor_of(exponent - below);
          }
      } else {
        run_by_groups(steps, sums);
      }
    } else {
      run(steps, base, sums);
    }
    // Neighbours in a row of C lie side by side: the layout of mxfp4_roles.py.
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int i = 0; i < kSums; ++i) C[band * kSums + i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = sums[band][i];
  }
};

// What the consumers do for a tile: C = the product of all of K.
template <tl::DataType kType, int kTokens, int kRows, int kWarpgroups, int kStages>
__device__ __forceinline__ void mxfp4_consume(float* C, const void* tokens, const void* codes, void* scales,
                                              Barrier* full, Barrier* empty, int* state, const void* first_scale,
                                              long long scale_stride, int rows, int K) {
  using Ring = Mxfp4Ring<kType, kTokens, kRows, kStages>;
  const Ring ring(tokens, codes, scales, full, empty, state);
  const Mxfp4Scales all{static_cast<const unsigned char*>(first_scale), scale_stride, rows};
  Mxfp4Consumer<kType, kTokens, kRows, kWarpgroups, kStages>(ring).product(all, (K + Ring::kStep - 1) / Ring::kStep, C);
}

// What the kThreads last threads of the producer do for a tile: they copy the scales of each stage.
template <tl::DataType kType, int kRows, int kStages, int kThreads>
__device__ __forceinline__ void mxfp4_fetch_scales(void* scales, Barrier* full, Barrier* empty, int* state,
                                                   const void* first_scale, long long scale_stride, int rows, int K) {
  using Ring = Mxfp4Ring<kType, 8, kRows, kStages>;
  const Ring ring(nullptr, nullptr, scales, full, empty, state);
  const int thread = threadIdx.x % 128 - (128 - kThreads);
  const char* from = static_cast<const char*>(first_scale) + thread * scale_stride;
#pragma unroll 1
  for (int step = 0; step < K / Ring::kStep; ++step) {
    empty[*ring.stage].wait(*ring.parity ^ 1);
#pragma unroll
    for (int i = 0; i < (kRows + kThreads - 1) / kThreads; ++i) {
      const int row = i * kThreads + thread;
      if (row < kRows)
        copy_4(ring.scales + *ring.stage * kRows + row,
               from + i * kThreads * scale_stride + step * Ring::kStep / 128 * 4, row < rows ? 4 : 0);
    }
    arrive_behind_copies(&full[*ring.stage]);
    ring.advance();
  }
}

// The four scales from a group on, of which those past the last are zeros; loads are of kAligned bytes.
template <int kAligned>
__device__ __forceinline__ unsigned load_scales(const unsigned char* row, int group, int groups) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 4; i += kAligned) {
    const unsigned char* from = row + group + i;
    unsigned part = 0;
    if (group + i < groups) {
      if constexpr (kAligned == 4) part = *reinterpret_cast<const unsigned*>(from);
      if constexpr (kAligned == 2) part = *reinterpret_cast<const unsigned short*>(from);
      if constexpr (kAligned == 1) part = *from;
    }
    word |= part << (8 * i);
  }
  return group + 4 <= groups ? word : word & ((1u << (8 * (groups - group))) - 1);
}

// What the same threads do where they gather tokens, or scales begin anywhere, or K ends inside a stage: they load the
// scales of a stage ahead, and copy the rows of tokens whose numbers are the lower 24 bits of ids. What is copied is
// shown to the matrix unit before a stage is full.
template <tl::DataType kType, int kTokens, int kRows, int kStages, int kThreads, int kAligned, bool kGathers>
__device__ __forceinline__ void mxfp4_fetch(void* scales, Barrier* full, Barrier* empty, int* state,
                                            const void* first_scale, long long scale_stride, int rows, int K,
                                            void* tokens, const int* ids, const void* first_token,
                                            long long token_stride, int token_rows) {
  using Ring = Mxfp4Ring<kType, kTokens, kRows, kStages>;
  constexpr int kWords = (kRows + kThreads - 1) / kThreads;  // of scales of a thread
  constexpr int kPieces = 8;                                 // of 16 bytes of a token in a stage
  constexpr int kCopies = kGathers ? (kTokens * kPieces + kThreads - 1) / kThreads : 0;  // of a thread
  constexpr int kAhead = kStages > 6 ? 4 : kStages / 2;                                  // stages under way
  constexpr int kLoads = kCopies > 4 ? 2 : 4;                                            // of scales, steps ahead
  const Ring ring(tokens, nullptr, scales, full, empty, state);
  const int thread = threadIdx.x % 128 - (128 - kThreads), piece = thread % kPieces;
  const int groups = K / 32, steps = (K + Ring::kStep - 1) / Ring::kStep, bytes = K * (Ring::kFp8 ? 1 : 2);
  const unsigned char* from = static_cast<const unsigned char*>(first_scale) + thread * scale_stride;
  const unsigned char* piece_of_first = static_cast<const unsigned char*>(first_token) + piece * 16;

  int token[kCopies + 1];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = (i * kThreads + thread) / kPieces;
    token[i] = row < kTokens ? ids[row] & 0xffffff : token_rows;
  }
  const auto load = [&](int step, unsigned (&words)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const bool inside = i * kThreads + thread < (rows < kRows ? rows : kRows);
      const int group = step * Ring::kStep / 128 * 4;
      words[i] = inside ? load_scales<kAligned>(from + i * kThreads * scale_stride, group, groups) : 0;
    }
  };
  const auto arrive = [&](int stage) { full[stage].arrive(); };

  unsigned words[kLoads][kWords];
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    if (i < steps) load(i, words[i]);
  int behind = *ring.stage;  // the stage that is full next
#pragma unroll 1
  for (int first = 0; first < steps; first += kLoads) {
#pragma unroll
    for (int part = 0; part < kLoads; ++part) {
      const int step = first + part, stage = *ring.stage;
      if (step >= steps) break;
      empty[stage].wait(*ring.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (i * kThreads + thread < kRows) ring.scales[stage * kRows + i * kThreads + thread] = words[part][i];
      if (step + kLoads < steps) load(step + kLoads, words[part]);
      if constexpr (kGathers) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const int row = (i * kThreads + thread) / kPieces, at = step * 128 + piece * 16;
          const bool exists = token[i] < token_rows;
          if (row < kTokens)
            copy_16(
                static_cast<unsigned char*>(tokens) + stage * Ring::kTokenBytes + row * 128 + (piece ^ row % 8) * 16,
                piece_of_first + (exists ? token[i] : 0) * token_stride + (at < bytes ? step * 128 : 0),
                exists && at < bytes);
        }
        close_copies();
        if (step >= kAhead) {
          wait_for_copies<kAhead>();
          arrive(behind);
          if (++behind == kStages) behind = 0;
        }
      } else {
        arrive(stage);
      }
      ring.advance();
    }
  }
  if constexpr (kGathers) {
    wait_for_copies<0>();
#pragma unroll 1
    for (int left = steps < kAhead ? steps : kAhead; left > 0; --left) {
      arrive(behind);
      if (++behind == kStages) behind = 0;
    }
  }
}

}  // namespace tilelang_ext
