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

// Warps split K, and rows where there are many. Each copies the tokens and codes of its blocks of 128 of K to shared
// memory of its own, kStages blocks ahead; scales of many blocks are copied for all warps, and begin at words of global
// memory if kScaleWords. Behind the last block that memory holds the sums of the warp: of row r of its rows and a
// token, at token * (kRowsOfWarp + 4) + r. With lane = 4 g + t: a lane has rows g and g + 8 of 16, and of each block
// the 32 codes of group t, four words of eight, and as many elements of tokens. What lies past K, past the last row or
// past the last token is zeros.
template <int kTokens, int kRows, int kThreads, bool kScaleWords, int kStages>
struct Mxfp4Mma {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBands = kRows % 32 == 0 && kRows / 32 <= kWarps ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kRowsOfWarp = kBands * 16;
  static constexpr int kWarpsOfRows = kRows / kRowsOfWarp, kSplits = kWarps / kWarpsOfRows;
  static constexpr int kColumns = (kTokens + 7) / 8;
  static constexpr int kTokenBytes = kTokens * 256, kCodeBytes = kRowsOfWarp * 64;              // of a block
  static constexpr int kStageBytes = kTokenBytes + kCodeBytes, kBytes = kStages * kStageBytes;  // of a warp
  static constexpr int kScaleBlocks = 64, kScaleStride = 4 * kScaleBlocks + 4;  // rows begin in different banks

  const Mxfp4Operands& p;
  char *stages, *scales;
  int warp, lane, g, t, first_row, split, blocks;
  float sums[kBands][kColumns][4] = {};

  __device__ __forceinline__ Mxfp4Mma(const Mxfp4Operands& operands, void* shared) : p(operands) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    first_row = warp % kWarpsOfRows * kRowsOfWarp, split = warp / kWarpsOfRows, blocks = (p.K + 127) / 128;
    stages = static_cast<char*>(shared) + warp * kBytes, scales = static_cast<char*>(shared) + kWarps * kBytes;
  }

  // Bytes from the last word of global memory that begins before the scales of a row or with them to those scales.
  __device__ __forceinline__ int shift_of(int row) const {
    return kScaleWords ? 0 : reinterpret_cast<unsigned long long>(p.scale + row * p.scale_stride) & 3;
  }

  // Begins to copy the scales of kScaleBlocks blocks: the words of each row, which may begin and end with others'
  // bytes.
  __device__ __forceinline__ void copy_scales(int chunk) const {
    const int left = min(blocks - chunk, kScaleBlocks) * 4, groups = p.K / 32 - chunk * 4;
#pragma unroll
    for (int i = 0; i < (kRows + kWarps - 1) / kWarps; ++i) {
      const int row = i * kWarps + warp;
      if (kRows % kWarps != 0 && row >= kRows) break;
      const int shift = shift_of(row);
#pragma unroll 1
      for (int at = lane * 4; at < left + shift; at += 128) {
        const int bytes = row < p.w_rows ? max(0, min(4, groups + shift - at)) : 0;
        copy_4(scales + row * kScaleStride + at, p.scale + row * p.scale_stride + chunk * 4 - shift + at, bytes);
      }
    }
  }

  // Begins to copy tokens and codes of a block. Of a token 16 lanes copy 256 bytes, to places from which the lanes of
  // two tokens and all t read in different banks.
  __device__ __forceinline__ void copy(int block, char* stage) const {
    const int unit = lane % 16;
#pragma unroll
    for (int pair = 0; pair < (kTokens + 1) / 2; ++pair) {
      const int token = pair * 2 + lane / 16;
      if (kTokens % 2 == 0 || token < kTokens)
        copy_16(stage + token * 256 + place_of(token, unit) * 16, p.a + token * p.a_stride + block * 256 + unit * 16,
                token < p.a_rows && block * 128 + unit * 8 < p.K);
    }
#pragma unroll
    for (int eight = 0; eight < 2 * kBands; ++eight) {
      const int row = first_row + eight * 8 + g;
      copy_16(stage + kTokenBytes + eight * 512 + lane * 16, p.w + row * p.w_stride + block * 64 + t * 16,
              row < p.w_rows && block * 128 + t * 32 < p.K);
    }
  }

  static __device__ __forceinline__ int place_of(int token, int unit) { return unit ^ (unit / 8 | token % 2 * 2); }

  // 32 codes of each row of the lane by as many elements of its tokens.
  template <bool kFolds>
  __device__ __forceinline__ void multiply(const char* stage, const unsigned (&scale)[kBands][2]) {
    unsigned words[kBands][2][4];
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint4 four = *reinterpret_cast<const uint4*>(stage + kTokenBytes + (band * 2 + row) * 512 + lane * 16);
        words[band][row][0] = four.x, words[band][row][1] = four.y;
        words[band][row][2] = four.z, words[band][row][3] = four.w;
      }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      unsigned right[kColumns][4];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const int token = column * 8 + g;
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (kTokens % 8 == 0 || token < kTokens)
          eight = *reinterpret_cast<const uint4*>(stage + token * 256 + place_of(g, 4 * t + part) * 16);
        right[column][0] = select_bytes(eight.x, eight.z, 0x5410);
        right[column][1] = select_bytes(eight.x, eight.z, 0x7632);
        right[column][2] = select_bytes(eight.y, eight.w, 0x5410);
        right[column][3] = select_bytes(eight.y, eight.w, 0x7632);
      }
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        unsigned left[2][4];
#pragma unroll
        for (int row = 0; row < 2; ++row)
          decode_eight<kFolds>(words[band][row][part],
                               kFolds ? scale[band][row] * 0x00800080 + 126 * 0x00800080 : power_of(scale[band][row]),
                               left[row]);
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

  // A block, whose scales are the words `word` of the rows.
  __device__ __forceinline__ void multiply_block(const char* stage, int word) {
    unsigned scale[kBands][2], largest = 0;
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int at = first_row + band * 16 + row * 8 + g;
        scale[band][row] = static_cast<unsigned char>(scales[at * kScaleStride + shift_of(at) + word * 4 + t]);
        largest = max(largest, scale[band][row]);
      }
    if (__all_sync(0xffffffff, largest <= kLargestFolded))
      multiply<true>(stage, scale);
    else
      multiply<false>(stage, scale);
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int chunk = 0; chunk < blocks; chunk += kScaleBlocks) {
      const int end = min(blocks, chunk + kScaleBlocks);
      if (chunk > 0) __syncthreads();
      copy_scales(chunk);
      close_copies();
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        const int block = chunk + split + stage * kSplits;
        if (block < end) copy(block, stages + stage * kStageBytes);
        close_copies();
      }
      finish_copies<kStages>();
      __syncthreads();
#pragma unroll 1
      for (int block = chunk + split, stage = 0; block < end; block += kSplits, stage = (stage + 1) % kStages) {
        char* const own = stages + stage * kStageBytes;
        finish_copies<kStages - 1>();
        __syncwarp();
        multiply_block(own, block - chunk);
        __syncwarp();
        if (block + kStages * kSplits < end) copy(block + kStages * kSplits, own);
        close_copies();
      }
    }
  }

  __device__ __forceinline__ void store() const {
    float* const to = reinterpret_cast<float*>(stages);
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = column * 8 + t * 2 + i % 2;
          if (token < kTokens) to[token * (kRowsOfWarp + 4) + band * 16 + i / 2 * 8 + g] = sums[band][column][i];
        }
  }
};

template <int kTokens, int kRows, int kThreads, bool kScaleWords, int kStages, typename... Operands>
__device__ __forceinline__ void mxfp4_mma(float* shared, Operands... tiles) {
  const Mxfp4Operands operands{tiles...};
  Mxfp4Mma<kTokens, kRows, kThreads, kScaleWords, kStages> product(operands, shared);
  product.run();
  product.store();
  __syncthreads();
}

// Begins to bring bytes of a tile's rows to the L2 cache, which other kernels' writes go through: of all rows the first
// 128 bytes, which the first warps multiply, then the next. Bulk instructions for whole rows would be issued one lane
// after the other.
template <int kRows, int kThreads>
__device__ __forceinline__ void mxfp4_prefetch(const void* first, long long stride, int rows, int bytes) {
  for (int i = threadIdx.x; i < (bytes + 127) / 128 * kRows; i += kThreads)
    if (i % kRows < rows) prefetch(static_cast<const char*>(first) + i % kRows * stride + i / kRows * 128);
}

}  // namespace tilelang_ext
