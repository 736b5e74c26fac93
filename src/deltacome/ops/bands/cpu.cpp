// The bands ops on a CPU, from packed codes; `cpu.py` says why it is built this way.
//
// Compiled once for each instruction set into a library of its own; the compiler's flags pick the
// width of a vector below. A block of 64 codes is decoded into V vectors that stay in registers and
// are used for a chunk of up to 4 tokens. The layout of codes makes that three instructions a
// vector: the words of a block, repeated over the lanes, shifted by a number of bits that depends
// on the lane alone, are consecutive codes (docs/format.md). Up to 4 bits a code then indexes a
// register that holds the values of its group; the lookup ignores higher bits, so nothing is masked.
//
// Sums never depend on the number of threads: one direction, or one block of outputs, is summed by
// one thread in one order.
//
// Legend: T tokens, R directions, N entries of a direction, one float a lane.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE = 4;  // blocks × tokens whose sums fit into registers
constexpr int TABLE_BITS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TILE = 1;
constexpr int TABLE_BITS = 3;
#else
constexpr int LANES = 4;
constexpr int TILE = 1;
constexpr int TABLE_BITS = 0;
#endif
constexpr int BLOCK = 64;
constexpr int V = BLOCK / LANES;
constexpr int64_t CHUNK = 32;             // blocks of inputs whose 4 tokens stay in the L1 cache
constexpr int64_t MAX_TOKENS = 4;         // tokens that share one decoding
constexpr int64_t THREAD_WORK = 1 << 19;  // codes × tokens worth waking a thread for
constexpr int64_t AHEAD = 16;             // directions between a prefetch and its use
constexpr int RAGGED = 0;                 // any width, where groups cut through blocks

// Arrays of vectors stay in registers only if the loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 16")
// One function a kernel, so that a profile names it.
#define NOINLINE __attribute__((noinline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

inline vf load(const float *from) {
  vf v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float *to, vf v) { std::memcpy(to, &v, sizeof v); }
inline vf splat(float a) { return a - vf{}; }

inline float sum(vf v) {
  // Halves, so that the order is that of a tree.
  float lane[LANES];
  store(lane, v);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
}

inline float from_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float f) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // The exponent moves by multiplying, which also makes subnormal halves right.
  uint32_t bits = uint32_t(h & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  return h & 0x8000 ? -f : f;
#endif
}

struct Factor {
  int64_t bits, size, groups, group_size;
  const uint8_t *low, *high, *scale, *zero;  // at 16 bits, `low` are the values

  int64_t blocks() const { return (size + BLOCK - 1) / BLOCK; }

  uint16_t half(const uint8_t *array, int64_t index) const {
    uint16_t h;
    std::memcpy(&h, array + 2 * index, 2);
    return h;
  }

  uint32_t digit(const uint8_t *plane, int p, int64_t r, int64_t n) const {
    const int64_t k = n % BLOCK;
    uint32_t word;
    std::memcpy(&word, plane + 4 * ((r * blocks() + n / BLOCK) * 2 * p + k % (2 * p)), 4);
    return word >> (p * (k / (2 * p))) & ((1u << p) - 1);
  }

  // One entry, whatever the width and the size of a group.
  float value(int64_t r, int64_t n) const {
    if (bits == 16) return from_half(half(low, r * size + n));
    uint32_t code = digit(low, bits == 3 ? 2 : int(bits), r, n);
    if (bits == 3) code |= digit(high, 1, r, n) << 2;
    const int64_t g = r * groups + n / group_size;
    return (float(code) - float(zero[g])) * from_half(half(scale, g));
  }
};


// The words of a block of a plane of P bits, those of vector i, repeated over the lanes.
template <int P>
inline vu words(const uint8_t *block, int i) {
#if defined(__AVX512F__)
  (void)i;
  if constexpr (P == 1) {
    int64_t pair;
    std::memcpy(&pair, block, 8);
    return (vu)_mm512_set1_epi64(pair);
  } else if constexpr (P == 2) {
    return (vu)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)block));
  } else if constexpr (P == 4) {
    return (vu)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)block));
  }
#elif defined(__AVX2__)
  if constexpr (P == 1) {
    int64_t pair;
    std::memcpy(&pair, block, 8);
    return (vu)_mm256_set1_epi64x(pair);
  } else if constexpr (P == 2) {
    return (vu)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)block));
  }
#endif
  vu v;
  if constexpr (2 * P >= LANES) {
    std::memcpy(&v, block + 4 * (i * LANES % (2 * P)), sizeof v);
  } else {
    uint32_t pair[2];
    std::memcpy(pair, block, 8);
    for (int lane = 0; lane < LANES; ++lane) v[lane] = pair[lane % 2];
  }
  return v;
}

template <int P>
struct Shifts {
  uint32_t at[BLOCK] __attribute__((aligned(64)));
  constexpr Shifts() : at() {
    for (int k = 0; k < BLOCK; ++k) at[k] = uint32_t(P * (k / (2 * P)));
  }
};
template <int P>
constexpr Shifts<P> SHIFTS{};

// Codes of vector i of a block in the low P bits of each lane; what is above is other codes.
template <int P>
inline vu digits(const uint8_t *block, int i) {
  vu shift;
  std::memcpy(&shift, SHIFTS<P>.at + i * LANES, sizeof shift);
  return words<P>(block, i) >> shift;
}

template <int BITS>
constexpr bool TABLE = BITS != RAGGED && BITS <= TABLE_BITS;

// The scale and zero point of a group, ready for use.
template <int BITS>
struct Grid {
  vf table, scale, zero;

  Grid(const Factor &f, int64_t r, int64_t g) {
    if constexpr (BITS == 16 || BITS == RAGGED) return;
    const int64_t index = r * f.groups + g;
    scale = splat(from_half(f.half(f.scale, index)));
    zero = splat(float(f.zero[index]));
    if constexpr (TABLE<BITS>) {
      vf code;
      for (int lane = 0; lane < LANES; ++lane) code[lane] = float(lane % (1 << BITS));
      table = (code - zero) * scale;
    }
  }
};

inline vf lookup(vf table, vu index) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
  return (vf)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#else
  (void)index;
  return table;
#endif
}

// Values of block b of direction r.
template <int BITS>
inline void decode(const Factor &f, int64_t r, int64_t b, const Grid<BITS> &grid, vf *v) {
  if constexpr (BITS == RAGGED || BITS == 16) {
    const int64_t first = b * BLOCK, count = std::min<int64_t>(BLOCK, f.size - first);
    float values[BLOCK] = {};
    if (BITS == 16)
      for (int64_t k = 0; k < count; ++k)
        values[k] = from_half(f.half(f.low, r * f.size + first + k));
    else
      for (int64_t k = 0; k < count; ++k) values[k] = f.value(r, first + k);
    UNROLL
    for (int i = 0; i < V; ++i) v[i] = load(values + i * LANES);
  } else {
    constexpr int P = BITS == 3 ? 2 : BITS;
    const int64_t at = r * f.blocks() + b;
    const uint8_t *low = f.low + at * 8 * P;
    const uint8_t *high = f.high + at * 8;
    UNROLL
    for (int i = 0; i < V; ++i) {
      vu code = digits<P>(low, i);
      if constexpr (BITS == 3) code = (code & 3) | digits<1>(high, i) << 2;
      if constexpr (TABLE<BITS>) {
        v[i] = lookup(grid.table, code);
      } else {
        code &= (1u << BITS) - 1;
        v[i] = (__builtin_convertvector((vi)code, vf) - grid.zero) * grid.scale;
      }
    }
  }
}

// Directions lie a page or so apart: too far for the CPU to see which line comes next.
template <int BITS>
inline void prefetch(const Factor &f, int64_t r, int64_t b) {
  if constexpr (BITS != RAGGED && BITS != 16)
    __builtin_prefetch(f.low + (r * f.blocks() + b) * 8 * (BITS == 3 ? 2 : BITS));
}

template <int BITS>
inline int64_t blocks_of_group(const Factor &f) {
  return BITS == RAGGED || BITS == 16 ? f.blocks() : f.group_size / BLOCK;
}

// t[r, j] += Σ_n x[j, n] · value[r, n] over blocks b0 … b1, for TT tokens.
template <int BITS, int TT>
NOINLINE void shrink(const Factor &f, int64_t r0, int64_t r1, int64_t b0, int64_t b1,
                     const float *x, int64_t ldx, float *t) {
  constexpr int SUMS = TT == 1 ? std::min(V, 4) : 2;  // enough of them to hide the adder's latency
  const int64_t per_group = blocks_of_group<BITS>(f);
  for (int64_t r = r0; r < r1; ++r) {
    vf acc[TT][SUMS] = {};
    for (int64_t b = b0; b < b1;) {
      const int64_t g = int32_t(b) / int32_t(per_group);
      const Grid<BITS> grid(f, r, g);
      for (const int64_t end = std::min(b1, (g + 1) * per_group); b < end; ++b) {
        vf v[V];
        decode<BITS>(f, r, b, grid, v);
        UNROLL
        for (int j = 0; j < TT; ++j)
          UNROLL
          for (int i = 0; i < V; ++i)
            acc[j][i % SUMS] += load(x + j * ldx + b * BLOCK + i * LANES) * v[i];
      }
    }
    UNROLL
    for (int j = 0; j < TT; ++j) {
      vf total = acc[j][0];
      for (int i = 1; i < SUMS; ++i) total += acc[j][i];
      t[r * TT + j] += sum(total);
    }
  }
}

// y[j, block, :] += Σ_r t[r, j] · value[r, block, :] for NB blocks from b on and TT tokens.
template <int BITS, int TT, int NB>
NOINLINE void expand(const Factor &f, int64_t count, int64_t b, const float *t, float *y) {
  const int64_t per_group = blocks_of_group<BITS>(f);
  const int64_t g0 = b / per_group;
  vf acc[TT][NB * V];
  UNROLL
  for (int j = 0; j < TT; ++j)
    UNROLL
    for (int i = 0; i < NB * V; ++i) acc[j][i] = load(y + j * NB * BLOCK + i * LANES);
  for (int64_t r = 0; r < count; ++r) {
    vf weight[TT];
    UNROLL
    for (int j = 0; j < TT; ++j) weight[j] = splat(t[r * TT + j]);
    prefetch<BITS>(f, r + AHEAD, b);
    Grid<BITS> grid(f, r, g0);
    UNROLL
    for (int n = 0, g = int(g0); n < NB; ++n) {
      if (b + n >= (g + 1) * per_group) grid = Grid<BITS>(f, r, ++g);
      vf v[V];
      decode<BITS>(f, r, b + n, grid, v);
      UNROLL
      for (int j = 0; j < TT; ++j)
        UNROLL
        for (int i = 0; i < V; ++i) acc[j][n * V + i] += weight[j] * v[i];
    }
  }
  UNROLL
  for (int j = 0; j < TT; ++j)
    UNROLL
    for (int i = 0; i < NB * V; ++i) store(y + j * NB * BLOCK + i * LANES, acc[j][i]);
}

template <int TT>
void shrink_any(const Factor &f, int64_t r0, int64_t r1, int64_t b0, int64_t b1, const float *x,
                int64_t ldx, float *t) {
  const bool ragged = f.bits != 16 && f.group_size % BLOCK;
  switch (ragged ? RAGGED : f.bits) {
    case 1: return shrink<1, TT>(f, r0, r1, b0, b1, x, ldx, t);
    case 2: return shrink<2, TT>(f, r0, r1, b0, b1, x, ldx, t);
    case 3: return shrink<3, TT>(f, r0, r1, b0, b1, x, ldx, t);
    case 4: return shrink<4, TT>(f, r0, r1, b0, b1, x, ldx, t);
    case 8: return shrink<8, TT>(f, r0, r1, b0, b1, x, ldx, t);
    case 16: return shrink<16, TT>(f, r0, r1, b0, b1, x, ldx, t);
    default: return shrink<RAGGED, TT>(f, r0, r1, b0, b1, x, ldx, t);
  }
}

template <int TT, int NB>
void expand_any(const Factor &f, int64_t count, int64_t b, const float *t, float *y) {
  const bool ragged = f.bits != 16 && f.group_size % BLOCK;
  switch (ragged ? RAGGED : f.bits) {
    case 1: return expand<1, TT, NB>(f, count, b, t, y);
    case 2: return expand<2, TT, NB>(f, count, b, t, y);
    case 3: return expand<3, TT, NB>(f, count, b, t, y);
    case 4: return expand<4, TT, NB>(f, count, b, t, y);
    case 8: return expand<8, TT, NB>(f, count, b, t, y);
    case 16: return expand<16, TT, NB>(f, count, b, t, y);
    default: return expand<RAGGED, TT, NB>(f, count, b, t, y);
  }
}

struct Band {
  int64_t count, first;  // first: its place among the directions of all bands
  Factor v, u;
  const uint8_t *s;

  float singular(int64_t r) const {
    float a;
    std::memcpy(&a, s + 4 * r, 4);
    return a;
  }
};

constexpr int FIELDS = 11;  // of a band, as cpu.py lays them out: bits, count, V, U, s

std::vector<Band> read(const uint8_t *blob, const int64_t *layout, int64_t bands, int64_t out,
                       int64_t in, int64_t group_size) {
  const auto factor = [&](const int64_t *offset, int64_t bits, int64_t size) {
    return Factor{bits,
                  size,
                  (size + group_size - 1) / group_size,
                  group_size,
                  blob + offset[0],
                  blob + offset[1],
                  blob + offset[2],
                  blob + offset[3]};
  };
  std::vector<Band> result;
  int64_t first = 0;
  for (int64_t i = 0; i < bands; ++i, layout += FIELDS) {
    result.push_back({layout[1], first, factor(layout + 2, layout[0], in),
                      factor(layout + 6, layout[0], out), blob + layout[10]});
    first += layout[1];
  }
  return result;
}

// Rows of float32 or bfloat16; strides in entries, columns contiguous.
struct Matrix {
  void *data;
  int64_t stride;
  bool bf16;

  float get(int64_t row, int64_t column) const {
    const int64_t at = row * stride + column;
    return bf16 ? from_bf16(((const uint16_t *)data)[at]) : ((const float *)data)[at];
  }

  void add(int64_t row, int64_t column, const float *from, int64_t count) const {
    const int64_t at = row * stride + column;
    if (bf16) {
      uint16_t *to = (uint16_t *)data + at;
      for (int64_t k = 0; k < count; ++k) to[k] = to_bf16(from_bf16(to[k]) + from[k]);
    } else {
      float *to = (float *)data + at;
      for (int64_t k = 0; k < count; ++k) to[k] += from[k];
    }
  }
};

// Tokens from j on that share one decoding: 4, 2 or 1. The t of a chunk lies in one piece, (R, TT)
// from j · R on, so that expanding reads it in order.
inline int64_t chunk_of(int64_t j, int64_t tokens) {
  const int64_t left = tokens - j;
  return left >= MAX_TOKENS ? MAX_TOKENS : left >= 2 ? 2 : 1;
}

template <int TT, int NB>
void expand_tile(const std::vector<Band> &bands, bool with_u, int64_t b, int64_t j, const float *t,
                 const Matrix &y, int64_t size) {
  float tile[TT * NB * BLOCK] __attribute__((aligned(64))) = {};
  for (const Band &band : bands)
    expand_any<TT, NB>(with_u ? band.u : band.v, band.count, b, t + band.first * TT, tile);
  const int64_t column = b * BLOCK, count = std::min<int64_t>(NB * BLOCK, size - column);
  for (int64_t i = 0; i < TT; ++i) y.add(j + i, column, tile + i * NB * BLOCK, count);
}

template <int TT>
void expand_span(const std::vector<Band> &bands, bool with_u, int64_t b, int64_t b1, int64_t j,
                 const float *t, const Matrix &y, int64_t size) {
  constexpr int NB = std::max(1, TILE / TT);
  for (; b + NB <= b1; b += NB) expand_tile<TT, NB>(bands, with_u, b, j, t, y, size);
  for (; b < b1; ++b) expand_tile<TT, 1>(bands, with_u, b, j, t, y, size);
}

// y += tᵀ · (Û or V̂), inside of a parallel region.
void expand_all(const std::vector<Band> &bands, bool with_u, int64_t tokens, int64_t rank,
                const float *t, const Matrix &y, int64_t size) {
  const int64_t blocks = (size + BLOCK - 1) / BLOCK, span = 4;  // 2-bit codes of a cache line
#pragma omp for schedule(dynamic)
  for (int64_t b = 0; b < blocks; b += span) {
    const int64_t b1 = std::min(blocks, b + span);
    for (int64_t j = 0; j < tokens;) {
      const int64_t chunk = chunk_of(j, tokens);
      const float *tj = t + j * rank;
      if (chunk == 4) expand_span<4>(bands, with_u, b, b1, j, tj, y, size);
      if (chunk == 2) expand_span<2>(bands, with_u, b, b1, j, tj, y, size);
      if (chunk == 1) expand_span<1>(bands, with_u, b, b1, j, tj, y, size);
      j += chunk;
    }
  }
}

void shrink_range(const Band &band, int64_t r0, int64_t r1, int64_t tokens, int64_t rank,
                  const float *x, int64_t ldx, float *t) {
  const int64_t blocks = band.v.blocks();
  for (int64_t j = 0; j < tokens;) {
    const int64_t chunk = chunk_of(j, tokens);
    float *tj = t + j * rank + band.first * chunk;
    std::fill(tj + r0 * chunk, tj + r1 * chunk, 0.f);
    for (int64_t b = 0; b < blocks; b += CHUNK) {
      const int64_t b1 = std::min(blocks, b + CHUNK);
      const float *xj = x + j * ldx;
      if (chunk == 4) shrink_any<4>(band.v, r0, r1, b, b1, xj, ldx, tj);
      if (chunk == 2) shrink_any<2>(band.v, r0, r1, b, b1, xj, ldx, tj);
      if (chunk == 1) shrink_any<1>(band.v, r0, r1, b, b1, xj, ldx, tj);
    }
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t i = 0; i < chunk; ++i) tj[r * chunk + i] *= band.singular(r);
    j += chunk;
  }
}

int threads_for(int64_t work, int64_t threads) {
  return int(std::max<int64_t>(1, std::min(threads, work / THREAD_WORK)));
}

int64_t rank_of(const std::vector<Band> &bands) { return bands.back().first + bands.back().count; }

}  // namespace

extern "C" {

const char *deltacome_source() { return SOURCE; }

// y (T, O) += Σ ((x V̂ᵀ) · s) Û; scratch holds T · (64 ⌈I / 64⌉ + R) floats.
void deltacome_bands(void *y_data, int64_t y_stride, int64_t y_bf16, void *x_data, int64_t x_stride,
                     int64_t x_bf16, const uint8_t *blob, const int64_t *layout, int64_t n_bands,
                     int64_t tokens, int64_t out, int64_t in, int64_t group_size, float *scratch,
                     int64_t threads) {
  const std::vector<Band> bands = read(blob, layout, n_bands, out, in, group_size);
  const Matrix y{y_data, y_stride, y_bf16 != 0}, x{x_data, x_stride, x_bf16 != 0};
  const int64_t rank = rank_of(bands), ldx = (in + BLOCK - 1) / BLOCK * BLOCK;
  float *x_TI = scratch, *t_RT = scratch + tokens * ldx;
  const int64_t span = tokens > 32 ? 64 : 16;  // directions that use one piece of x from L1
  const int team = threads_for(rank * (in + out) * tokens, threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for
    for (int64_t j = 0; j < tokens; ++j) {
      for (int64_t n = 0; n < in; ++n) x_TI[j * ldx + n] = x.get(j, n);
      std::fill(x_TI + j * ldx + in, x_TI + (j + 1) * ldx, 0.f);
    }
    for (const Band &band : bands) {
#pragma omp for schedule(dynamic) nowait
      for (int64_t r = 0; r < band.count; r += span)
        shrink_range(band, r, std::min(band.count, r + span), tokens, rank, x_TI, ldx, t_RT);
    }
#pragma omp barrier
    expand_all(bands, true, tokens, rank, t_RT, y, out);
  }
}

// y (T, I) += scale · Σ Û[:, ids]ᵀ diag(s) V̂; scratch holds T · R floats. -1, and nothing written, if
// an id is no row.
int64_t deltacome_band_rows(void *y_data, int64_t y_stride, int64_t y_bf16, const int64_t *ids,
                            const uint8_t *blob, const int64_t *layout, int64_t n_bands,
                            int64_t tokens, int64_t rows, int64_t in, int64_t group_size,
                            float scale, float *scratch, int64_t threads) {
  for (int64_t j = 0; j < tokens; ++j)
    if (ids[j] < 0 || ids[j] >= rows) return -1;
  const std::vector<Band> bands = read(blob, layout, n_bands, rows, in, group_size);
  const Matrix y{y_data, y_stride, y_bf16 != 0};
  const int64_t rank = rank_of(bands);
  const int team = threads_for(rank * in * tokens, threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    for (const Band &band : bands) {
#pragma omp for nowait
      for (int64_t r = 0; r < band.count; ++r)
        for (int64_t j = 0; j < tokens;) {
          const int64_t chunk = chunk_of(j, tokens);
          float *tj = scratch + j * rank + (band.first + r) * chunk;
          for (int64_t i = 0; i < chunk; ++i)
            tj[i] = band.u.value(r, ids[j + i]) * (scale * band.singular(r));
          j += chunk;
        }
    }
#pragma omp barrier
    expand_all(bands, false, tokens, rank, scratch, y, in);
  }
  return 0;
}
}
