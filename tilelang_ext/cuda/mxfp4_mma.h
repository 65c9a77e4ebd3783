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
  static constexpr int kScales = kWarps * kBytes;

  const Mxfp4Operands p;
  char* shared;
  int warp, lane, g, t, first_row, split, blocks;
  bool is_full;  // whether no row and no K of a copy lies past the end
  // Where in shared memory a lane copies tokens to and reads them, its codes and the scales of its rows; where its part
  // of the next block that is copied begins. All of it is computed once, in a kernel that waits for another before it
  // does: the compiler would do so in every step.
  unsigned tokens_to, tokens, codes, scales[kBands][2];
  const char *next_tokens, *next_codes;
  float sums[kBands][kColumns][4] = {};

  template <typename... Operands>
  __device__ __forceinline__ explicit Mxfp4Mma(Operands... tiles) : p(tiles...) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    first_row = warp % kWarpsOfRows * kRowsOfWarp, split = warp / kWarpsOfRows, blocks = (p.K + 127) / 128;
    is_full = p.a_rows >= kTokens && p.w_rows >= kRows && p.K % 128 == 0;
    const int own = warp * kBytes, token = lane / 16, unit = lane % 16;
    tokens_to = keep(own + token * 256 + place_of(token, unit) * 16);
    codes = keep(own + kTokenBytes + lane * 16);
    tokens = keep(own + g * 256 + place_of(g, 4 * t) * 16);
    begin_at(0);
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int at = first_row + band * 16 + row * 8 + g;
        scales[band][row] = keep(kScales + at * kScaleStride + shift_of(at) + split * 4 + t);
      }
  }

  // Sets where a lane copies from first, of the blocks from `chunk` on.
  __device__ __forceinline__ void begin_at(int chunk) {
    next_tokens = keep(p.a + lane / 16 * p.a_stride + (chunk + split) * 256 + lane % 16 * 16);
    next_codes = keep(p.w + (first_row + g) * p.w_stride + (chunk + split) * 64 + t * 16);
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
        copy_4(shared + kScales + row * kScaleStride + at, p.scale + row * p.scale_stride + chunk * 4 - shift + at,
               bytes);
      }
    }
  }

  // Begins to copy tokens and codes of the next block, to a stage. Of a token 16 lanes copy 256 bytes, to places from
  // which the lanes of two tokens and all t read in different banks.
  template <bool kFull>
  __device__ __forceinline__ void copy_rows(int block, int stage) const {
    const bool has_elements = block * 128 + lane % 16 * 8 < p.K, has_codes = block * 128 + t * 32 < p.K;
#pragma unroll
    for (int pair = 0; pair < (kTokens + 1) / 2; ++pair) {
      const int token = pair * 2 + lane / 16;
      if (kTokens % 2 == 0 || token < kTokens)
        copy_16(shared + tokens_to + stage + pair * 512, next_tokens + pair * 2 * p.a_stride,
                kFull || (token < p.a_rows && has_elements));
    }
#pragma unroll
    for (int eight = 0; eight < 2 * kBands; ++eight)
      copy_16(shared + codes + stage + eight * 512, next_codes + eight * 8 * p.w_stride,
              kFull || (first_row + eight * 8 + g < p.w_rows && has_codes));
  }

  __device__ __forceinline__ void copy(int block, int stage) {
    if (is_full)
      copy_rows<true>(block, stage);
    else
      copy_rows<false>(block, stage);
    next_tokens += kSplits * 256, next_codes += kSplits * 64;
  }

  static __device__ __forceinline__ int place_of(int token, int unit) { return unit ^ (unit / 8 | token % 2 * 2); }

  // 32 codes of each row of the lane by as many elements of its tokens.
  template <bool kFolds>
  __device__ __forceinline__ void multiply(int stage, const unsigned (&scale)[kBands][2]) {
    unsigned words[kBands][2][4];
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint4 four = *reinterpret_cast<const uint4*>(shared + codes + stage + (band * 2 + row) * 512);
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
          eight = *reinterpret_cast<const uint4*>(shared + ((tokens + stage) ^ part * 16) + column * 2048);
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

  // A block in a stage, whose scales are the words `word` of the rows.
  __device__ __forceinline__ void multiply_block(int stage, int word) {
    unsigned scale[kBands][2], largest = 0;
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        scale[band][row] = static_cast<unsigned char>(shared[scales[band][row] + word * 4]);
        largest = max(largest, scale[band][row]);
      }
    if (__all_sync(0xffffffff, largest <= kLargestFolded))
      multiply<true>(stage, scale);
    else
      multiply<false>(stage, scale);
  }

  template <bool kTriggers>
  __device__ __forceinline__ void multiply_all() {
#pragma unroll 1
    for (int chunk = 0; chunk < blocks; chunk += kScaleBlocks) {
      const int end = min(blocks, chunk + kScaleBlocks);
      if (chunk > 0) {
        __syncthreads();
        begin_at(chunk);
      }
      copy_scales(chunk);
      close_copies();
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        const int block = chunk + split + stage * kSplits;
        if (block < end) copy(block, stage * kStageBytes);
        close_copies();
      }
      if (kTriggers && chunk == 0) let_next_begin();
      finish_copies<kStages>();
      __syncthreads();
#pragma unroll 1
      for (int block = chunk + split, stage = 0; block < end; block += kSplits) {
        finish_copies<kStages - 1>();
        __syncwarp();
        multiply_block(stage, block - chunk - split);
        __syncwarp();
        if (block + kStages * kSplits < end) copy(block + kStages * kSplits, stage);
        close_copies();
        stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
      }
    }
  }

  __device__ __forceinline__ void store() const {
    float* const to = reinterpret_cast<float*>(shared + warp * kBytes);
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

  // Computes the sums of the warps, in shared memory. Lets the next kernel begin behind the first copies if kTriggers.
  template <bool kTriggers = false>
  __device__ __forceinline__ void run(float* staged) {
    shared = reinterpret_cast<char*>(staged);
    multiply_all<kTriggers>();
    store();
    __syncthreads();
  }
};

template <int kTokens, int kRows, int kThreads, bool kScaleWords, int kStages, typename... Operands>
__device__ __forceinline__ void mxfp4_mma(float* shared, Operands... tiles) {
  Mxfp4Mma<kTokens, kRows, kThreads, kScaleWords, kStages>(tiles...).run(shared);
}

// Begins to bring bytes of a tile's rows to the L2 cache, which other kernels' writes go through: of all rows the first
// 128 bytes, which the first warps multiply, then the next. Bulk instructions for whole rows would be issued one lane
// after the other.
template <int kRows, int kThreads>
__device__ __forceinline__ void mxfp4_prefetch(const void* first, long long stride, int rows, int bytes) {
  for (int i = threadIdx.x; i < (bytes + 127) / 128 * kRows; i += kThreads)
    if (i % kRows < rows) prefetch(static_cast<const char*>(first) + i % kRows * stride + i / kRows * 128);
}

// The same of rows that all blocks read, each a part of the lines.
template <int kRows, int kThreads>
__device__ __forceinline__ void mxfp4_prefetch_part(const void* first, long long stride, int rows, int bytes) {
  for (int i = threadIdx.x * gridDim.x + blockIdx.x; i < (bytes + 127) / 128 * kRows; i += kThreads * gridDim.x)
    if (i % kRows < rows) prefetch(static_cast<const char*>(first) + i % kRows * stride + i / kRows * 128);
}

}  // namespace tilelang_ext
