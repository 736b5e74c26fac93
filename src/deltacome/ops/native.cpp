// The ops on a CPU, from packed codes; `native.py` says why it is built this way.
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
#include <cmath>
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

// Σ_n ±x[j, n] over all blocks of a row of signs, for TT tokens.
template <int TT>
NOINLINE void sign_sums(const uint8_t *words, int64_t blocks, const float *x, int64_t ldx,
                        float *sums) {
  vf table;  // at every even place −1, at every odd one +1
  for (int lane = 0; lane < LANES; ++lane) table[lane] = lane % 2 ? 1.f : -1.f;
  vf acc[TT][2] = {};
  for (int64_t b = 0; b < blocks; ++b)
    UNROLL
    for (int i = 0; i < V; ++i) {
      const vu code = digits<1>(words + b * 8, i);
      const vf sign = TABLE<1> ? lookup(table, code)
                               : __builtin_convertvector((vi)(code & 1), vf) * 2.f - 1.f;
      UNROLL
      for (int j = 0; j < TT; ++j)
        acc[j][i % 2] += load(x + j * ldx + b * BLOCK + i * LANES) * sign;
    }
  for (int j = 0; j < TT; ++j) sums[j] = sum(acc[j][0] + acc[j][1]);
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
  int64_t count, first;  // first: its place among the directions of its slot
  Factor v, u;
  const uint8_t *s;

  float singular(int64_t r) const {
    float a;
    std::memcpy(&a, s + 4 * r, 4);
    return a;
  }
};

// What the slots of a pool hold for one layer; `fields` as ops/slots.py lays them out.
struct Table {
  const uint8_t *blobs;
  int64_t slot_bytes;
  const int64_t *fields;
  int64_t slots, parts, max_bands;
  const int64_t *outs;  // rows of each part
  int64_t in, group_size;

  static constexpr int FIELDS = 12;  // of a band: bits, count, first, V (4), U (4), s

  std::vector<Band> bands(int64_t slot, int64_t part) const {
    const uint8_t *base = blobs + slot * slot_bytes;
    const auto factor = [&](const int64_t *offset, int64_t bits, int64_t size) {
      return Factor{bits,
                    size,
                    (size + group_size - 1) / group_size,
                    group_size,
                    base + offset[0],
                    base + offset[1],
                    base + offset[2],
                    base + offset[3]};
    };
    std::vector<Band> result;
    const int64_t *f = fields + (slot * parts + part) * max_bands * FIELDS;
    for (int64_t i = 0; i < max_bands; ++i, f += FIELDS)
      if (f[1])
        result.push_back({f[1], f[2], factor(f + 3, f[0], in), factor(f + 7, f[0], outs[part]),
                          base + f[11]});
    return result;
  }
};

// Rows of float32 or bfloat16; strides in entries, columns contiguous.
struct Matrix {
  void *data;
  int64_t stride;
  bool bf16;

  float get(int64_t row, int64_t column) const {
    const int64_t at = row * stride + column;
    return bf16 ? from_bf16(((const uint16_t *)data)[at]) : ((const float *)data)[at];
  }

  void set(int64_t row, const float *from, int64_t count) const {
    const int64_t at = row * stride;
    if (bf16)
      for (int64_t k = 0; k < count; ++k) ((uint16_t *)data)[at + k] = to_bf16(from[k]);
    else
      std::memcpy((float *)data + at, from, 4 * count);
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

// One part's outputs of one tenant's rows, or all inputs for rows of an embedding.
struct Target {
  const std::vector<Band> *bands;
  bool with_u;
  int64_t rank, size, column;  // column: the first in y
  const int64_t *rows;         // of y
  int64_t tokens;
  const float *t;
};

template <int TT, int NB>
void expand_tile(const Target &to, int64_t b, int64_t j, const Matrix &y) {
  float tile[TT * NB * BLOCK] __attribute__((aligned(64))) = {};
  const float *t = to.t + j * to.rank;
  for (const Band &band : *to.bands)
    expand_any<TT, NB>(to.with_u ? band.u : band.v, band.count, b, t + band.first * TT, tile);
  const int64_t first = b * BLOCK, count = std::min<int64_t>(NB * BLOCK, to.size - first);
  for (int64_t i = 0; i < TT; ++i)
    y.add(to.rows[j + i], to.column + first, tile + i * NB * BLOCK, count);
}

template <int TT>
void expand_span(const Target &to, int64_t b, int64_t b1, int64_t j, const Matrix &y) {
  constexpr int NB = std::max(1, TILE / TT);
  for (; b + NB <= b1; b += NB) expand_tile<TT, NB>(to, b, j, y);
  for (; b < b1; ++b) expand_tile<TT, 1>(to, b, j, y);
}

void expand_blocks(const Target &to, int64_t b, int64_t b1, const Matrix &y) {
  for (int64_t j = 0; j < to.tokens;) {
    const int64_t chunk = chunk_of(j, to.tokens);
    if (chunk == 4) expand_span<4>(to, b, b1, j, y);
    if (chunk == 2) expand_span<2>(to, b, b1, j, y);
    if (chunk == 1) expand_span<1>(to, b, b1, j, y);
    j += chunk;
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

// The rows of one slot, and where their x and t lie in the scratch.
struct Group {
  int64_t slot, first, tokens;        // first: place of the first row among those of all groups
  std::vector<std::vector<Band>> parts;
  int64_t rank, t;
};

// Rows by slot. -1 if a slot is out of range, else the number of rows that have one.
int64_t group(const int32_t *slot, int64_t tokens, int64_t slots, std::vector<Group> &groups,
              std::vector<int64_t> &rows) {
  int64_t live = 0;
  for (int64_t j = 0; j < tokens; ++j) {
    if (slot[j] < -1 || slot[j] >= slots) return -1;
    live += slot[j] >= 0;
  }
  if (!live) return 0;
  std::vector<int64_t> count(slots, 0);
  for (int64_t j = 0; j < tokens; ++j)
    if (slot[j] >= 0) ++count[slot[j]];
  int64_t first = 0;
  for (int64_t s = 0; s < slots; ++s) {
    if (count[s]) groups.push_back({s, first, count[s], {}, 0, 0});
    first += count[s];
    count[s] = first - count[s];  // from here on: where its next row goes
  }
  rows.resize(live);
  for (int64_t j = 0; j < tokens; ++j)
    if (slot[j] >= 0) rows[count[slot[j]]++] = j;
  return live;
}

// Reads what the slots of the groups hold; drops those that hold nothing. The floats of all t.
int64_t read(const Table &table, std::vector<Group> &groups) {
  int64_t floats = 0;
  size_t kept = 0;
  for (Group &g : groups) {
    for (int64_t p = 0; p < table.parts; ++p) {
      g.parts.push_back(table.bands(g.slot, p));
      for (const Band &band : g.parts.back()) g.rank = std::max(g.rank, band.first + band.count);
    }
    g.t = floats;
    floats += g.rank * g.tokens;
    if (g.rank) std::swap(groups[kept++], g);
  }
  groups.resize(kept);
  return floats;
}

// Memory that a thread keeps from call to call.
float *scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

struct Task {
  const Group *group;
  int64_t part, band, first, last;
};

constexpr int64_t SPAN = 4;  // blocks of outputs: 2-bit codes of a cache line

}  // namespace

extern "C" {

const char *deltacome_source() { return SOURCE; }

// y (T, O) += Σ ((x V̂ᵀ) · s) Û with the bands of each row's slot. -1, and nothing written, if a slot
// is out of range.
int64_t deltacome_bands(void *y_data, int64_t y_stride, int64_t y_bf16, void *x_data,
                        int64_t x_stride, int64_t x_bf16, const int32_t *slot, int64_t tokens,
                        const uint8_t *blobs, int64_t slot_bytes, const int64_t *fields,
                        int64_t slots, int64_t parts, int64_t max_bands, const int64_t *outs,
                        int64_t in, int64_t group_size, int64_t threads) {
  std::vector<Group> groups;
  std::vector<int64_t> rows;
  const int64_t live = group(slot, tokens, slots, groups, rows);
  if (live <= 0) return live;
  const Table table{blobs, slot_bytes, fields, slots, parts, max_bands, outs, in, group_size};
  const int64_t floats = read(table, groups);
  if (groups.empty()) return live;
  const Matrix y{y_data, y_stride, y_bf16 != 0}, x{x_data, x_stride, x_bf16 != 0};
  const int64_t ldx = (in + BLOCK - 1) / BLOCK * BLOCK;
  float *x_TI = scratch(live * ldx + floats), *t = x_TI + live * ldx;

  std::vector<Task> shrinks, expands;
  std::vector<Target> targets;
  int64_t work = 0;
  for (const Group &g : groups) {
    const int64_t span = g.tokens > 32 ? 64 : 16;  // directions that use one piece of x from L1
    int64_t column = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const std::vector<Band> &bands = g.parts[p];
      for (int64_t i = 0; i < int64_t(bands.size()); ++i) {
        for (int64_t r = 0; r < bands[i].count; r += span)
          shrinks.push_back({&g, p, i, r, std::min(bands[i].count, r + span)});
        work += bands[i].count * (in + outs[p]) * g.tokens;
      }
      if (!bands.empty()) {
        const int64_t blocks = (outs[p] + BLOCK - 1) / BLOCK;
        for (int64_t b = 0; b < blocks; b += SPAN)
          expands.push_back({&g, int64_t(targets.size()), 0, b, std::min(blocks, b + SPAN)});
        targets.push_back({&bands, true, g.rank, outs[p], column, rows.data() + g.first, g.tokens,
                           t + g.t});
      }
      column += outs[p];
    }
  }
  const int team = threads_for(work, threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    for (const Group &g : groups) {
#pragma omp for nowait
      for (int64_t j = g.first; j < g.first + g.tokens; ++j) {
        for (int64_t n = 0; n < in; ++n) x_TI[j * ldx + n] = x.get(rows[j], n);
        std::fill(x_TI + j * ldx + in, x_TI + (j + 1) * ldx, 0.f);
      }
    }
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (const Task &task : shrinks) {
      const Group &g = *task.group;
      shrink_range(g.parts[task.part][task.band], task.first, task.last, g.tokens, g.rank,
                   x_TI + g.first * ldx, ldx, t + g.t);
    }
#pragma omp for schedule(dynamic)
    for (const Task &task : expands) expand_blocks(targets[task.part], task.first, task.last, y);
  }
  return live;
}

// y (T, I) += scale · Σ Û[:, ids]ᵀ diag(s) V̂ with the bands of each row's slot. -1 if a slot is out of
// range, -2 if an id is no row; nothing is written then.
int64_t deltacome_band_rows(void *y_data, int64_t y_stride, int64_t y_bf16, const int64_t *ids,
                            const int32_t *slot, int64_t tokens, const uint8_t *blobs,
                            int64_t slot_bytes, const int64_t *fields, int64_t slots,
                            int64_t max_bands, int64_t out, int64_t in, int64_t group_size,
                            float scale, int64_t threads) {
  std::vector<Group> groups;
  std::vector<int64_t> rows;
  const int64_t live = group(slot, tokens, slots, groups, rows);
  if (live <= 0) return live;
  const Table table{blobs, slot_bytes, fields, slots, 1, max_bands, &out, in, group_size};
  const int64_t floats = read(table, groups);
  for (const Group &g : groups)
    for (int64_t j = g.first; j < g.first + g.tokens; ++j)
      if (ids[rows[j]] < 0 || ids[rows[j]] >= out) return -2;
  const Matrix y{y_data, y_stride, y_bf16 != 0};
  float *t = scratch(floats);
  std::vector<Task> expands;
  std::vector<Target> targets;
  const int64_t blocks = (in + BLOCK - 1) / BLOCK;
  int64_t work = 0;
  for (const Group &g : groups) {
    for (int64_t b = 0; b < blocks; b += SPAN)
      expands.push_back({&g, int64_t(targets.size()), 0, b, std::min(blocks, b + SPAN)});
    targets.push_back(
        {&g.parts[0], false, g.rank, in, 0, rows.data() + g.first, g.tokens, t + g.t});
    work += g.rank * in * g.tokens;
  }
  const int team = threads_for(work, threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    for (const Group &g : groups)
      for (const Band &band : g.parts[0]) {
#pragma omp for nowait
        for (int64_t r = 0; r < band.count; ++r)
          for (int64_t j = 0; j < g.tokens;) {
            const int64_t chunk = chunk_of(j, g.tokens);
            float *tj = t + g.t + j * g.rank + (band.first + r) * chunk;
            for (int64_t i = 0; i < chunk; ++i)
              tj[i] = band.u.value(r, ids[rows[g.first + j + i]]) * (scale * band.singular(r));
            j += chunk;
          }
      }
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (const Task &task : expands) expand_blocks(targets[task.part], task.first, task.last, y);
  }
  return live;
}

// y[t, o] += α[o] · Σ ±x[t] with the signs of each row's slot; `fields` (slots, parts, 3) are offsets of
// words and scales, and how many scales there are. -1 as above.
int64_t deltacome_signs(void *y_data, int64_t y_stride, int64_t y_bf16, void *x_data,
                        int64_t x_stride, int64_t x_bf16, const int32_t *slot, int64_t tokens,
                        const uint8_t *blobs, int64_t slot_bytes, const int64_t *fields,
                        int64_t slots, int64_t parts, const int64_t *outs, int64_t in,
                        int64_t threads) {
  std::vector<Group> groups;
  std::vector<int64_t> rows;
  const int64_t live = group(slot, tokens, slots, groups, rows);
  if (live <= 0) return live;
  const Matrix y{y_data, y_stride, y_bf16 != 0}, x{x_data, x_stride, x_bf16 != 0};
  const int64_t ldx = (in + BLOCK - 1) / BLOCK * BLOCK;
  float *x_TI = scratch(live * ldx);
  std::vector<Task> tasks;
  int64_t work = 0;
  for (const Group &g : groups) {
    int64_t column = 0;
    for (int64_t p = 0; p < parts; ++p) {
      if (fields[(g.slot * parts + p) * 3 + 2]) {
        for (int64_t o = 0; o < outs[p]; o += 16)
          tasks.push_back({&g, p, column, o, std::min(outs[p], o + 16)});
        work += outs[p] * in * g.tokens;
      }
      column += outs[p];
    }
  }
  const int team = threads_for(work, threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for
    for (int64_t j = 0; j < live; ++j) {
      for (int64_t n = 0; n < in; ++n) x_TI[j * ldx + n] = x.get(rows[j], n);
      std::fill(x_TI + j * ldx + in, x_TI + (j + 1) * ldx, 0.f);
    }
#pragma omp for schedule(dynamic)
    for (const Task &task : tasks) {
      const Group &g = *task.group;
      const int64_t *f = fields + (g.slot * parts + task.part) * 3;
      const uint8_t *base = blobs + g.slot * slot_bytes;
      for (int64_t o = task.first; o < task.last; ++o) {
        float alpha;
        std::memcpy(&alpha, base + f[1] + 4 * (f[2] > 1 ? o : 0), 4);
        const uint8_t *words = base + f[0] + o * (ldx / 8);
        for (int64_t j = 0; j < g.tokens;) {
          const int64_t chunk = chunk_of(j, g.tokens);
          const float *xj = x_TI + (g.first + j) * ldx;
          float sums[MAX_TOKENS];
          if (chunk == 4) sign_sums<4>(words, ldx / BLOCK, xj, ldx, sums);
          if (chunk == 2) sign_sums<2>(words, ldx / BLOCK, xj, ldx, sums);
          if (chunk == 1) sign_sums<1>(words, ldx / BLOCK, xj, ldx, sums);
          for (int64_t i = 0; i < chunk; ++i) {
            sums[i] *= alpha;
            y.add(rows[g.first + j + i], task.band + o, sums + i, 1);
          }
          j += chunk;
        }
      }
    }
  }
  return live;
}

// y[t] = x[t] / √(mean(x[t]²) + eps) · w[slot] for rows that have a slot. -1 as above.
int64_t deltacome_norm(void *y_data, int64_t y_stride, int64_t y_bf16, void *x_data,
                       int64_t x_stride, int64_t x_bf16, const int32_t *slot, int64_t tokens,
                       const float *weights, int64_t slots, int64_t size, double eps) {
  for (int64_t j = 0; j < tokens; ++j)
    if (slot[j] < -1 || slot[j] >= slots) return -1;
  const Matrix y{y_data, y_stride, y_bf16 != 0}, x{x_data, x_stride, x_bf16 != 0};
  float *row = scratch(size);
  for (int64_t j = 0; j < tokens; ++j) {
    if (slot[j] < 0) continue;
    double squares = 0;
    for (int64_t n = 0; n < size; ++n) {
      row[n] = x.get(j, n);
      squares += double(row[n]) * row[n];
    }
    const float factor = float(1 / std::sqrt(squares / size + eps));
    const float *w = weights + slot[j] * size;
    for (int64_t n = 0; n < size; ++n) row[n] = row[n] * factor * w[n];
    y.set(j, row, size);
  }
  return 0;
}
}
