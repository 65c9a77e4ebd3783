// Products of up to 16 tokens and MXFP4 weights on Hopper, for all of K, by all threads of a block. See mxfp4_few.py.
namespace tilelang_ext {

// A tile of each operand in global memory: its first element, bytes from row to row, and the rows that exist.
struct Mxfp4Operands {
  const char *a, *w, *scale;
  long long a_stride, w_stride, scale_stride;
  int a_rows, w_rows, K;

  __device__ __forceinline__ Mxfp4Operands(const void* a, const void* w, const void* scale, long long a_stride,
                                           long long w_stride, long long scale_stride, int a_rows, int w_rows, int K)
      : a(static_cast<const char*>(a)),
        w(static_cast<const char*>(w)),
        scale(static_cast<const char*>(scale)),
        a_stride(a_stride),
        w_stride(w_stride),
        scale_stride(scale_stride),
        a_rows(a_rows),
        w_rows(w_rows),
        K(K) {}
};

// Eight codes to four registers of two, codes i and i + 4: the multiplication copies a nibble to the place of its
// magnitude and to that of its sign.
template <bool kFolds>
__device__ __forceinline__ void decode_eight(unsigned word, unsigned power, unsigned (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned codes = (i < 2 ? word : word >> 8) & (i % 2 ? 0x00f000f0 : 0x000f000f);
    unsigned bits = codes * (i % 2 ? 0x0104 : 0x1040) & (kMagnitudes | kSigns);
    if (!kFolds) bits = times_bfloat16(bits, both(253));
    out[i] = times_bfloat16(bits, power);
  }
}

// Warps split K, and rows where there are many; weights and tokens come straight from global memory. Part s of the sums
// lies in sums[s][token][row]. With lane = 4 g + t: a lane has rows g and g + 8 of 16, and of each 128 of K the 32 codes
// of group t, four words of eight, and as many elements of tokens; zeros where K ends before.
template <int kTokens, int kRows, int kThreads>
struct Mxfp4Mma {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBands = kRows % 32 == 0 && kRows / 32 <= kWarps ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kWarpsOfRows = kRows / 16 / kBands, kSplits = kWarps / kWarpsOfRows;
  static constexpr int kColumns = (kTokens + 7) / 8;
  // Blocks of 128 of K that are under way together.
  static constexpr int kAhead = kColumns == 1 && kThreads <= 256 ? 4 : 2;

  const Mxfp4Operands& p;
  int first_row, split, blocks, groups, g, t;  // `groups` of 32 of K that there are from the lane's first on
  float sums[kBands][kColumns][4] = {};

  __device__ __forceinline__ explicit Mxfp4Mma(const Mxfp4Operands& operands) : p(operands) {
    const int warp = threadIdx.x / 32;
    g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, blocks = (p.K + 127) / 128;
    groups = p.K / 32 - t;
    first_row = warp % kWarpsOfRows * kBands * 16, split = warp / kWarpsOfRows;
  }

  __device__ __forceinline__ int row_of(int band, int row) const { return first_row + band * 16 + row * 8 + g; }

  __device__ __forceinline__ void load_tokens(int block, uint4 (&tokens)[kColumns][4]) const {
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        tokens[column][part] = make_uint4(0, 0, 0, 0);
        if (column * 8 + g < min(kTokens, p.a_rows) && block * 4 < groups)
          tokens[column][part] =
              *reinterpret_cast<const uint4*>(p.a + (column * 8 + g) * p.a_stride + block * 256 +
                                              t * 64 + part * 16);
      }
  }

  __device__ __forceinline__ void load_scales(int block, unsigned (&scales)[kBands][2]) const {
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int at = row_of(band, row);
        scales[band][row] = 0;
        if (at < p.w_rows && block * 4 < groups)
          scales[band][row] = static_cast<unsigned char>(p.scale[at * p.scale_stride + block * 4 + t]);
      }
  }

  __device__ __forceinline__ void load_codes(int block, unsigned (&codes)[kBands][2][4]) const {
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int at = row_of(band, row);
        uint4 four = make_uint4(0, 0, 0, 0);
        if (at < p.w_rows && block * 4 < groups) four = load_once(p.w + at * p.w_stride + block * 64 + t * 16);
        codes[band][row][0] = four.x, codes[band][row][1] = four.y;
        codes[band][row][2] = four.z, codes[band][row][3] = four.w;
      }
  }

  // 32 codes of each row of the lane by as many elements of its tokens.
  template <bool kFolds>
  __device__ __forceinline__ void multiply(const unsigned (&codes)[kBands][2][4], const unsigned (&scales)[kBands][2],
                                           const uint4 (&tokens)[kColumns][4]) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      unsigned right[kColumns][4];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const uint4& eight = tokens[column][part];
        right[column][0] = select_bytes(eight.x, eight.z, 0x5410);
        right[column][1] = select_bytes(eight.x, eight.z, 0x7632);
        right[column][2] = select_bytes(eight.y, eight.w, 0x5410);
        right[column][3] = select_bytes(eight.y, eight.w, 0x7632);
      }
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        unsigned left[2][4];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const unsigned scale = scales[band][row];
          decode_eight<kFolds>(codes[band][row][part],
                               kFolds ? scale * 0x00800080 + 126 * 0x00800080 : power_of(scale), left[row]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned a[4] = {left[0][2 * half], left[1][2 * half], left[0][2 * half + 1], left[1][2 * half + 1]};
#pragma unroll
          for (int column = 0; column < kColumns; ++column)
            tl::mma_sync<tl::DataType::kBFloat16, tl::DataType::kBFloat16, tl::DataType::kFloat32, 16, 8, 16, false,
                         true>(sums[band][column], a, &right[column][2 * half]);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_block(const unsigned (&codes)[kBands][2][4],
                                                 const unsigned (&scales)[kBands][2],
                                                 const uint4 (&tokens)[kColumns][4]) {
    bool folds = true;
#pragma unroll
    for (int band = 0; band < kBands; ++band)
      folds = folds && !any_larger(scales[band][0]) && !any_larger(scales[band][1]);
    if (__all_sync(0xffffffff, folds))
      multiply<true>(codes, scales, tokens);
    else
      multiply<false>(codes, scales, tokens);
  }

  // Weights of kAhead blocks are under way together, and tokens of two.
  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int first = split * kAhead; first < blocks; first += kSplits * kAhead) {
      unsigned codes[kAhead][kBands][2][4], scales[kAhead][kBands][2];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        load_codes(first + ahead, codes[ahead]);
        load_scales(first + ahead, scales[ahead]);
      }
      uint4 tokens[2][kColumns][4];
      load_tokens(first, tokens[0]);
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        if (first + ahead >= blocks) break;
        if (ahead + 1 < kAhead) load_tokens(first + ahead + 1, tokens[(ahead + 1) % 2]);
        multiply_block(codes[ahead], scales[ahead], tokens[ahead % 2]);
      }
    }
  }

  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = column * 8 + t * 2 + i % 2;
          if (token < kTokens) to[(split * kTokens + token) * kRows + row_of(band, i / 2)] = sums[band][column][i];
        }
  }
};

template <int kTokens, int kRows, int kThreads, typename... Operands>
__device__ __forceinline__ void mxfp4_mma(float* sums, Operands... tiles) {
  const Mxfp4Operands operands{tiles...};
  Mxfp4Mma<kTokens, kRows, kThreads> product(operands);
  product.run();
  product.store(sums);
  __syncthreads();
}

// Begins to bring bytes of a tile's rows to the L2 cache, which other kernels' writes go through. A thread asks for 128
// bytes at a time: bulk instructions for whole rows would be issued one lane after the other.
template <int kRows, int kThreads>
__device__ __forceinline__ void mxfp4_prefetch(const void* first, long long stride, int rows, int bytes) {
  const int lines = (bytes + 127) / 128;
  for (int i = threadIdx.x; i < min(kRows, rows) * lines; i += kThreads)
    prefetch(static_cast<const char*>(first) + i / lines * stride + i % lines * 128);
}

}  // namespace tilelang_ext
