// The ops on a CPU, from packed codes; `native.py` says why it is built this way.
//
// Compiled once for each instruction set into a library of its own; the compiler's flags pick the
// width of a vector below. A block of 64 codes is decoded into V vectors that stay in registers and
// are used for a chunk of up to 4 tokens. The layout of codes makes that two instructions a vector:
// the words of a block, repeated over the lanes, hold consecutive codes, each at a place that depends
// on the lane alone (docs/format.md). Codes are not brought down from there: what a mask leaves of a
// word, made a float, is the code times a power of two, and that is divided out of sums or rows.
// Scales and zero points stay out of the innermost loops too: a scale multiplies what a direction
// weighs, a zero point the sum of a group's inputs. What a thread reads next is fetched beside its
// sums (`Ahead`).
//
// Sums never depend on the number of threads: one direction, or one block of outputs, is summed by
// one thread in one order.
//
// Legend: T tokens, R directions, N entries of a direction, one float a lane.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE = 16;  // vectors of sums that fit into registers
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TILE = 8;
#else
constexpr int LANES = 4;
constexpr int TILE = 16;
#endif
constexpr int BLOCK = 64;
constexpr int V = BLOCK / LANES;
constexpr int64_t CHUNK = 32;             // blocks of inputs whose 4 tokens stay in the L1 cache
constexpr int64_t MAX_TOKENS = 4;         // tokens that share one decoding
constexpr int64_t THREAD_WORK = 1 << 17;  // codes × tokens worth waking a thread for
constexpr int64_t AHEAD = 16;             // directions between a prefetch and its use
constexpr int64_t SPAN = 4;               // blocks of outputs: 2-bit codes of a cache line
constexpr int64_t MAX_SPAN = 16;          // of a task: so many groups fill a register
constexpr int64_t SIGN_ROWS = 16;         // of a task
constexpr int64_t SIGN_FIELDS = 3;        // offsets of words and scales, and how many scales
constexpr int RAGGED = 0;                 // any width, where groups cut through blocks

// Arrays of vectors stay in registers only if the loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 16")
// One function a kernel, so that a profile names it.
#define NOINLINE __attribute__((noinline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

inline vf load(const float *from) {
  vf v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float *to, vf v) { std::memcpy(to, &v, sizeof v); }
inline vf splat(float a) { return a - vf{}; }

inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
#else
  // Halves, so that the order is that of a tree.
  float lane[LANES];
  store(lane, v);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
#endif
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

inline void store(uint16_t *to, vf v) {  // likewise
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const vh h = __builtin_convertvector(v == v ? rounded : vu{} + 0x7fc0, vh);
  std::memcpy(to, &h, sizeof h);
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

// The first `count` of up to 16 numbers as floats; up to `left` of them may be read. Of `to`, which has
// room for 16, the rest of the last vector is finite.
inline void from_halves(const uint8_t *from, float *to, int64_t count, int64_t left) {
#if defined(__AVX512F__)
  (void)left;
  const __m256i raw = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
  _mm512_storeu_ps(to, _mm512_cvtph_ps(raw));
#else
  int64_t i = 0;
#if defined(__F16C__)
  for (; i < count && i + LANES <= left; i += LANES)
    store(to + i, (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i))));
#endif
  for (; i < count; ++i) {
    uint16_t h;
    std::memcpy(&h, from + 2 * i, 2);
    to[i] = from_half(h);
  }
  for (; i % LANES; ++i) to[i] = 0;
#endif
}

inline void from_bytes(const uint8_t *from, float *to, int64_t count, int64_t left) {
#if defined(__AVX512F__)
  (void)left;
  const __m128i raw = _mm_maskz_loadu_epi8(__mmask16((1u << count) - 1), from);
  _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(raw)));
#else
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i < count && i + LANES <= left; i += LANES)
    store(to + i, (vf)_mm256_cvtepi32_ps(
                      _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + i)))));
#endif
  for (; i < count; ++i) to[i] = from[i];
  for (; i % LANES; ++i) to[i] = 0;
#endif
}

struct Factor {
  int64_t bits, directions, size, blocks, groups, group_size;
  const uint8_t *low, *high, *scale, *zero;  // at 16 bits, `low` are the values

  uint16_t half(const uint8_t *array, int64_t index) const {
    uint16_t h;
    std::memcpy(&h, array + 2 * index, 2);
    return h;
  }

  uint32_t digit(const uint8_t *plane, int p, int64_t r, int64_t n) const {
    const int64_t k = n % BLOCK;
    uint32_t word;
    std::memcpy(&word, plane + 4 * ((r * blocks + n / BLOCK) * 2 * p + k % (2 * p)), 4);
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

  // Whether codes of a block have one scale: not numbers, and not groups that cut through blocks.
  bool gridded() const { return bits != 16 && group_size % BLOCK == 0; }
};

// Scales and zero points of up to 16 groups of a direction, from `first` on.
struct Grids {
  float scale[16], zero[16];

  Grids(const Factor &f, int64_t r, int64_t first, int64_t count) {
    const int64_t at = r * f.groups + first, left = f.directions * f.groups - at;
    from_halves(f.scale + 2 * at, scale, count, left);
    from_bytes(f.zero + at, zero, count, left);
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

// Where the codes of a plane of P bits lie in their words: the masks that leave them, and what makes
// codes of that again. A code at the top of its word, which would be a sign, is moved down first.
template <int P>
struct Places {
  uint32_t mask[BLOCK] __attribute__((aligned(64)));
  float unit[BLOCK] __attribute__((aligned(64)));  // 2^−place

  static constexpr int place(int k) { return P * (k / (2 * P)) - down(k / LANES); }
  static constexpr int down(int i) {  // of vector i
    return P * ((i * LANES + LANES - 1) / (2 * P)) + P == 32 ? P : 0;
  }
  constexpr Places() : mask(), unit() {
    for (int k = 0; k < BLOCK; ++k) {
      mask[k] = ((1u << P) - 1) << place(k);
      unit[k] = 1.f / float(1u << place(k));
    }
  }
};
template <int P>
constexpr Places<P> PLACES{};

template <int BITS>
constexpr int PLANE = BITS == 3 ? 2 : BITS;  // bits of a code in the lower plane

// Codes of vector i of a block, times 2^place.
template <int P>
inline vf in_place(const uint8_t *block, int i) {
  vu mask;
  std::memcpy(&mask, PLACES<P>.mask + i * LANES, sizeof mask);
  const vu word = words<P>(block, i) >> Places<P>::down(i);
  return __builtin_convertvector((vi)(word & mask), vf);
}

// What brings the third bit of a code to the place of the other two.
struct Lift {
  float at[BLOCK] __attribute__((aligned(64)));
  constexpr Lift() : at() {
    for (int k = 0; k < BLOCK; ++k) at[k] = 4 * PLACES<1>.unit[k] / PLACES<2>.unit[k];
  }
};
constexpr Lift LIFT{};

template <int BITS>
constexpr bool GRID = BITS != 16 && BITS != RAGGED;

// 2^−place of vector i, or 1 where `decode` gives values.
template <int BITS>
inline vf unit(int i) {
  if constexpr (GRID<BITS>) return load(PLACES<PLANE<BITS>>.unit + i * LANES);
  return splat(1.f);
}

// Vector i of block b of direction r: codes times 2^place, or values. One at a time, each used at once:
// a compiler that has all of a block first runs out of registers.
template <int BITS>
inline vf decode(const Factor &f, int64_t r, int64_t b, int i) {
  if constexpr (GRID<BITS>) {
    const int64_t at = (r * f.blocks + b) * 8;
    vf v = in_place<PLANE<BITS>>(f.low + at * PLANE<BITS>, i);
    if constexpr (BITS == 3) v += in_place<1>(f.high + at, i) * load(LIFT.at + i * LANES);
    return v;
  } else {
    const int64_t first = b * BLOCK + i * LANES;
    const int64_t count = std::clamp<int64_t>(f.size - first, 0, LANES), at = r * f.size + first;
    float values[16] = {};
    if (BITS == 16) from_halves(f.low + 2 * at, values, count, f.directions * f.size - at);
    for (int64_t k = 0; BITS != 16 && k < count; ++k) values[k] = f.value(r, first + k);
    for (int64_t k = count; k < LANES; ++k) values[k] = 0;  // another direction's
    return load(values);
  }
}

// Directions of a large matrix lie pages apart: too far for the CPU to see which line is next.
template <int BITS>
inline void prefetch(const Factor &f, int64_t r, int64_t b) {
  if constexpr (BITS != RAGGED && BITS != 16)
    __builtin_prefetch(f.low + (r * f.blocks + b) * 8 * PLANE<BITS>);
}

// Bytes that this thread reads next, fetched beside its sums as fast as it uses up what it has. A
// tenant's part of a layer is some kilobytes, of which the CPU's own prefetching sees little before
// they end.
struct Ahead {
  bool with_u;  // V alone for rows of an embedding: of U they read a code here and there
  const struct Band *band = nullptr, *last = nullptr;
  const uint8_t *at = nullptr, *end = nullptr;

  void start(const Band *first, const Band *last);
  void all(const Band *first, const Band *last);
  void next();
  void lines(int64_t count) {
    if (at >= end) return;
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at + 64 * i, 0, 2);  // or past the end
    at += 64 * count;
  }
};

template <int BITS>
constexpr int BITS_OF = BITS == RAGGED ? 8 : BITS;

template <int BITS>
inline int64_t blocks_of_group(const Factor &f) {
  return GRID<BITS> ? f.group_size / BLOCK : f.blocks;
}

// The sums of a row's groups, zero up to `room`; nothing to be used where groups cut through blocks.
void sum_groups(const float *x, int64_t size, int64_t group_size, float *sums, int64_t room) {
  std::fill(sums, sums + room, 0.f);
  if (group_size % BLOCK) return;
  for (int64_t n = 0, g = 0; n < size; ++g) {
    vf total = {};
    for (const int64_t end = std::min(size, n + group_size); n < end; n += LANES) total += load(x + n);
    sums[g] = sum(total);
  }
}

// −Σ_g Σ x[j, g] · scale[r, g] · zero[r, g], a part of it in each lane, for the sums over groups of a row,
// which are zero up to a multiple of 16.
template <int TT>
inline void zero_points(const Factor &f, int64_t r, const float *sums, int64_t ld, vf *total) {
  for (int64_t g = 0; g < f.groups; g += 16) {
    const int64_t count = std::min<int64_t>(16, f.groups - g);
    const Grids grids(f, r, g, count);
    for (int64_t k = 0; k < count; k += LANES) {
      const vf both = load(grids.scale + k) * load(grids.zero + k);
      UNROLL
      for (int j = 0; j < TT; ++j) total[j] -= both * load(sums + j * ld + g + k);
    }
  }
}

// t[r, j] += Σ_n x[j, n] · value[r, n] over blocks b0 … b1, for TT tokens; what zero points add, for all
// blocks, comes with the first.
template <int BITS, int TT>
NOINLINE void shrink(const Factor f, int64_t r0, int64_t r1, int64_t b0, int64_t b1,
                     const float *x, int64_t ldx, const float *sums, int64_t lds, float *t,
                     Ahead &next) {
  constexpr int SUMS = TT == 1 ? std::min(V, 4) : 2;  // enough of them to hide the adder's latency
  const int32_t per_group = int32_t(blocks_of_group<BITS>(f));
  const int64_t g0 = int32_t(b0) / per_group, g1 = int32_t(b1 + per_group - 1) / per_group;
  const int64_t lines = (b1 - b0) * BITS_OF<BITS> / 8 + 1;  // of a direction
  // Divided once for all directions, by what codes are multiplied with where they lie.
  float scaled[TT * CHUNK * BLOCK] __attribute__((aligned(64)));
  for (int64_t j = 0; j < TT; ++j)
    for (int64_t n = b0; n < b1; ++n)
      UNROLL
      for (int i = 0; i < V; ++i)
        store(scaled + (j * CHUNK + n - b0) * BLOCK + i * LANES,
              load(x + j * ldx + n * BLOCK + i * LANES) * unit<BITS>(i));
  for (int64_t r = r0; r < r1; ++r) {
    next.lines(lines);
    vf all[TT] = {}, total[TT][SUMS] = {};
    if (GRID<BITS> && !b0) zero_points<TT>(f, r, sums, lds, all);
    int64_t b = b0;
    for (int64_t g = g0; g < g1; g += 16) {
      const int64_t count = std::min<int64_t>(16, g1 - g);
      float scale[16];
      if constexpr (GRID<BITS>) {
        const int64_t at = r * f.groups + g;
        from_halves(f.scale + 2 * at, scale, count, f.directions * f.groups - at);
      }
      for (int64_t k = 0; k < count; ++k) {
        vf acc[TT][SUMS] = {};
        for (const int64_t end = std::min<int64_t>(b1, (g + k + 1) * per_group); b < end; ++b)
          UNROLL
          for (int i = 0; i < V; ++i) {
            const vf v = decode<BITS>(f, r, b, i);
            UNROLL
            for (int j = 0; j < TT; ++j)
              acc[j][i % SUMS] += load(scaled + (j * CHUNK + b - b0) * BLOCK + i * LANES) * v;
          }
        UNROLL
        for (int j = 0; j < TT; ++j)
          UNROLL
          for (int i = 0; i < SUMS; ++i)
            total[j][i] += GRID<BITS> ? splat(scale[k]) * acc[j][i] : acc[j][i];
      }
    }
    UNROLL
    for (int j = 0; j < TT; ++j) {
      UNROLL
      for (int n = SUMS / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) total[j][i] += total[j][i + n];
      t[r * TT + j] += sum(total[j][0] + all[j]);
    }
  }
}

// What each direction weighs in up to 16 groups of TT tokens' outputs, and what zero points add there.
struct Weights {
  const float *at;      // (count, TT, apart)
  const float *offset;  // (TT, apart)
  int64_t first, apart;  // first: group

  static int64_t apart_of(int64_t groups) { return (groups + LANES - 1) / LANES * LANES; }
  static int64_t room(int64_t count, int64_t groups, int64_t tokens) {
    return (count + 1) * tokens * apart_of(groups);
  }
};

// `t` (count, TT); `memory` has room.
template <int TT>
Weights weights_of(const Factor &f, int64_t count, int64_t first, int64_t groups, const float *t,
                   float *memory) {
  const int64_t apart = Weights::apart_of(groups);
  float *offset = memory, *weight = memory + TT * apart;
  for (int64_t g = 0; g < groups; g += LANES) {
    vf add[TT] = {};
    for (int64_t r = 0; r < count; ++r) {
      vf scale = splat(1.f), zero = {};
      if (f.gridded()) {
        const Grids grids(f, r, first + g, std::min<int64_t>(LANES, groups - g));
        scale = load(grids.scale), zero = load(grids.zero);
      }
      UNROLL
      for (int j = 0; j < TT; ++j) {
        const vf w = scale * t[r * TT + j];
        store(weight + (r * TT + j) * apart + g, w);
        add[j] -= w * zero;
      }
    }
    UNROLL
    for (int j = 0; j < TT; ++j) store(offset + j * apart + g, add[j]);
  }
  return {weight, offset, first, apart};
}

// y[j, block, :] += Σ_r weight[r, j] · code[r, block, :] + offset[j] for NB blocks from b on and TT tokens,
// whose y lie ldy floats apart. W vectors of a block have sums in registers at a time.
template <int BITS, int TT, int NB>
NOINLINE void expand(const Factor f, int64_t count, int64_t b, const Weights weights, float *y,
                     int64_t ldy, Ahead &next) {
  constexpr int W = std::min(V, TILE / TT);
  const int64_t per_group = blocks_of_group<BITS>(f);
  int64_t lane[NB];
  for (int n = 0; n < NB; ++n) lane[n] = (b + n) / per_group - weights.first;
  UNROLL
  for (int i0 = 0; i0 < V; i0 += W) {
    vf acc[TT][NB * W] = {};
    for (int64_t r = 0; r < count; ++r) {
      if (i0 == 0) {
        prefetch<BITS>(f, r + AHEAD, b);
        next.lines(NB * BITS_OF<BITS> / 8 + 1);
      }
      UNROLL
      for (int n = 0; n < NB; ++n) {
        vf weight[TT];
        UNROLL
        for (int j = 0; j < TT; ++j)
          weight[j] = splat(weights.at[(r * TT + j) * weights.apart + lane[n]]);
        UNROLL
        for (int i = 0; i < W; ++i) {
          const vf v = decode<BITS>(f, r, b + n, i0 + i);
          UNROLL
          for (int j = 0; j < TT; ++j) acc[j][n * W + i] += weight[j] * v;
        }
      }
    }
    UNROLL
    for (int j = 0; j < TT; ++j)
      UNROLL
      for (int n = 0; n < NB; ++n)
        UNROLL
        for (int i = 0; i < W; ++i) {
          float *to = y + j * ldy + n * BLOCK + (i0 + i) * LANES;
          const vf offset = splat(weights.offset[j * weights.apart + lane[n]]);
          store(to, load(to) + (acc[j][n * W + i] * unit<BITS>(i0 + i) + offset));
        }
  }
}

// Entries n … n1 of direction r, times a factor, as bfloat16; n is the first of a block.
template <int BITS>
NOINLINE void write(const Factor f, int64_t r, int64_t n, int64_t n1, float times, uint16_t *to) {
  const int64_t per_group = blocks_of_group<BITS>(f);
  for (int64_t b = n / BLOCK; b * BLOCK < n1; ++b, to += BLOCK) {
    vf v[V];
    UNROLL
    for (int i = 0; i < V; ++i) v[i] = decode<BITS>(f, r, b, i);
    if constexpr (GRID<BITS>) {
      const Grids grid(f, r, b / per_group, 1);
      UNROLL
      for (int i = 0; i < V; ++i) v[i] = (v[i] * unit<BITS>(i) - grid.zero[0]) * grid.scale[0];
    }
    uint16_t part[BLOCK], *all = b * BLOCK + BLOCK <= n1 ? to : part;
    UNROLL
    for (int i = 0; i < V; ++i) store(all + i * LANES, v[i] * times);
    if (all == part) std::copy(part, part + n1 - b * BLOCK, to);
  }
}

void write_any(const Factor &f, int64_t r, int64_t n, int64_t n1, float times, uint16_t *to) {
  switch (f.bits == 16 || f.gridded() ? f.bits : RAGGED) {
    case 1: return write<1>(f, r, n, n1, times, to);
    case 2: return write<2>(f, r, n, n1, times, to);
    case 3: return write<3>(f, r, n, n1, times, to);
    case 4: return write<4>(f, r, n, n1, times, to);
    case 8: return write<8>(f, r, n, n1, times, to);
    case 16: return write<16>(f, r, n, n1, times, to);
    default: return write<RAGGED>(f, r, n, n1, times, to);
  }
}

// How far each bit of a block is from the top of its word.
struct SignPlaces {
  uint32_t up[BLOCK] __attribute__((aligned(64)));
  constexpr SignPlaces() : up() {
    for (int k = 0; k < BLOCK; ++k) up[k] = 31 - uint32_t(k / 2);
  }
};
constexpr SignPlaces SIGN_PLACES{};

// Σ_n ±x[j, n] over all blocks of a row of signs, for TT tokens.
template <int TT>
NOINLINE void sign_sums(const uint8_t *signs, int64_t blocks, const float *x, int64_t ldx,
                        float *sums) {
  vf acc[TT][2] = {};
  for (int64_t b = 0; b < blocks; ++b)
    UNROLL
    for (int i = 0; i < V; ++i) {
      // The bit becomes the sign of −1.
      vu up;
      std::memcpy(&up, SIGN_PLACES.up + i * LANES, sizeof up);
      const vf sign = (vf)(((words<1>(signs + b * 8, i) << up) & 0x80000000) ^ 0xbf800000);
      UNROLL
      for (int j = 0; j < TT; ++j)
        acc[j][i % 2] += load(x + j * ldx + b * BLOCK + i * LANES) * sign;
    }
  for (int j = 0; j < TT; ++j) sums[j] = sum(acc[j][0] + acc[j][1]);
}

template <int TT>
void shrink_any(const Factor &f, int64_t r0, int64_t r1, int64_t b0, int64_t b1, const float *x,
                int64_t ldx, const float *sums, int64_t lds, float *t, Ahead &next) {
  switch (f.bits == 16 || f.gridded() ? f.bits : RAGGED) {
    case 1: return shrink<1, TT>(f, r0, r1, b0, b1, x, ldx, sums, lds, t, next);
    case 2: return shrink<2, TT>(f, r0, r1, b0, b1, x, ldx, sums, lds, t, next);
    case 3: return shrink<3, TT>(f, r0, r1, b0, b1, x, ldx, sums, lds, t, next);
    case 4: return shrink<4, TT>(f, r0, r1, b0, b1, x, ldx, sums, lds, t, next);
    case 8: return shrink<8, TT>(f, r0, r1, b0, b1, x, ldx, sums, lds, t, next);
    case 16: return shrink<16, TT>(f, r0, r1, b0, b1, x, ldx, sums, lds, t, next);
    default: return shrink<RAGGED, TT>(f, r0, r1, b0, b1, x, ldx, sums, lds, t, next);
  }
}

template <int TT, int NB>
void expand_any(const Factor &f, int64_t count, int64_t b, const Weights &w, float *y, int64_t ldy,
                Ahead &next) {
  switch (f.bits == 16 || f.gridded() ? f.bits : RAGGED) {
    case 1: return expand<1, TT, NB>(f, count, b, w, y, ldy, next);
    case 2: return expand<2, TT, NB>(f, count, b, w, y, ldy, next);
    case 3: return expand<3, TT, NB>(f, count, b, w, y, ldy, next);
    case 4: return expand<4, TT, NB>(f, count, b, w, y, ldy, next);
    case 8: return expand<8, TT, NB>(f, count, b, w, y, ldy, next);
    case 16: return expand<16, TT, NB>(f, count, b, w, y, ldy, next);
    default: return expand<RAGGED, TT, NB>(f, count, b, w, y, ldy, next);
  }
}

struct Band {
  int64_t part, count, first;  // first: its place among the directions of its slot
  Factor v, u;
  const uint8_t *s;

  float singular(int64_t r) const {
    float a;
    std::memcpy(&a, s + 4 * r, 4);
    return a;
  }
};

void Ahead::start(const Band *first, const Band *last_) {
  band = first;
  last = last_;
  at = end;
  next();
}
void Ahead::next() {
  if (at < end || band == last) return;
  at = band->v.low;
  end = with_u ? band->s + 4 * band->count : band->u.low;
  ++band;
}
void Ahead::all(const Band *first, const Band *last_) {
  for (start(first, last_); at < end; next()) lines((end - at + 63) / 64);
}

// What the slots of a pool hold for one layer; `fields` as ops/slots.py lays them out.
struct Table {
  const uint8_t *blobs;
  int64_t slot_bytes;
  const int64_t *fields;
  int64_t slots, parts, max_bands;
  const int64_t *outs;  // rows of each part
  int64_t in, group_size;

  static constexpr int FIELDS = 12;  // of a band: bits, count, first, V (4), U (4), s

  // Adds the bands of a slot, part by part.
  void read(int64_t slot, std::vector<Band> &bands) const {
    const uint8_t *base = blobs + slot * slot_bytes;
    const auto factor = [&](const int64_t *offset, int64_t bits, int64_t count, int64_t size) {
      return Factor{bits,
                    count,
                    size,
                    (size + BLOCK - 1) / BLOCK,
                    (size + group_size - 1) / group_size,
                    group_size,
                    base + offset[0],
                    base + offset[1],
                    base + offset[2],
                    base + offset[3]};
    };
    const int64_t *f = fields + slot * parts * max_bands * FIELDS;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < max_bands; ++i, f += FIELDS)
        if (f[1])
          bands.push_back({part, f[1], f[2], factor(f + 3, f[0], f[1], in),
                           factor(f + 7, f[0], f[1], outs[part]), base + f[11]});
  }
};

// Rows of float32 or bfloat16; strides in entries, columns contiguous.
struct Matrix {
  void *data;
  int64_t stride;
  bool bf16;

  // A row as floats, followed by zeros up to `room`.
  void get(int64_t row, int64_t count, float *to, int64_t room) const {
    const int64_t at = row * stride;
    if (bf16) {
      const uint16_t *from = (const uint16_t *)data + at;
      for (int64_t k = 0; k < count; ++k) to[k] = from_bf16(from[k]);
    } else {
      std::memcpy(to, (const float *)data + at, 4 * count);
    }
    std::fill(to + count, to + room, 0.f);
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
  const Band *bands, *end;
  bool with_u;
  int64_t rank, size, column;  // column: the first in y
  const int64_t *rows;         // of y
  int64_t tokens;
  const float *t;
  bool bytes;  // whether factors are read so where they can be (native_bytes.h)

  const Factor &factor(const Band *band) const { return with_u ? band->u : band->v; }
};

// What a thread keeps from call to call.
thread_local std::vector<Weights> weighed;
thread_local std::vector<float> weight_memory;

// The weights of each band that is read as floats, and of some tokens from j on, for blocks b … b1.
template <int TT, class AsFloats>
void weigh(const Target &to, int64_t b, int64_t b1, int64_t j, AsFloats as_floats) {
  const auto groups_of = [&](const Factor &f, int64_t &first) {
    const int64_t per_group = f.gridded() ? f.group_size / BLOCK : f.blocks;
    first = b / per_group;
    return (b1 - 1) / per_group + 1 - first;
  };
  int64_t room = 0, first;
  for (const Band *band = to.bands; band != to.end; ++band)
    if (as_floats(band)) room += Weights::room(band->count, groups_of(to.factor(band), first), TT);
  if (int64_t(weight_memory.size()) < room) weight_memory.resize(room);
  weighed.clear();
  float *memory = weight_memory.data();
  for (const Band *band = to.bands; band != to.end; ++band) {
    if (!as_floats(band)) continue;
    const Factor &f = to.factor(band);
    const int64_t groups = groups_of(f, first);
    const float *t = to.t + j * to.rank + band->first * TT;
    weighed.push_back(weights_of<TT>(f, band->count, first, groups, t, memory));
    memory += Weights::room(band->count, groups, TT);
  }
}

// tile[j, n, :] += Σ_r t[r, j] · value[r, block b + n, :] for up to SPAN blocks of TT tokens.
template <int TT>
void expand_floats(const Factor &f, int64_t count, int64_t b, int64_t blocks, const Weights &weights,
                   float *tile, Ahead &next) {
  constexpr int NB = std::max(1, TILE / (TT * V));
  int64_t n = 0;
  for (; n + NB <= blocks; n += NB)
    expand_any<TT, NB>(f, count, b + n, weights, tile + n * BLOCK, SPAN * BLOCK, next);
  for (; n < blocks; ++n)
    expand_any<TT, 1>(f, count, b + n, weights, tile + n * BLOCK, SPAN * BLOCK, next);
}

// Blocks b … b1 of the outputs of TT tokens from j on, SPAN at a time.
template <int TT>
void expand_span(const Target &to, int64_t b, int64_t b1, int64_t j, const Matrix &y, Ahead &next) {
  weigh<TT>(to, b, b1, j, [](const Band *) { return true; });
  for (int64_t at = b; at < b1; at += SPAN) {
    const int64_t blocks = std::min(SPAN, b1 - at);
    float tile[TT * SPAN * BLOCK] __attribute__((aligned(64))) = {};
    const Weights *weights = weighed.data();
    for (const Band *band = to.bands; band != to.end; ++band)
      expand_floats<TT>(to.factor(band), band->count, at, blocks, *weights++, tile, next);
    const int64_t first = at * BLOCK, count = std::min(blocks * BLOCK, to.size - first);
    for (int i = 0; i < TT; ++i)
      y.add(to.rows[j + i], to.column + first, tile + i * SPAN * BLOCK, count);
  }
}

#if defined(__AVX512VNNI__)
#include "native_bytes.h"
#else
inline int64_t halves_room(int64_t, int64_t) { return 0; }
inline void to_halves(const float *, float *, int64_t, int64_t, int64_t) {}
#endif

void expand_blocks(const Target &to, int64_t b, int64_t b1, const Matrix &y, Ahead &next) {
  for (int64_t j = 0; j < to.tokens;) {
    const int64_t chunk = chunk_of(j, to.tokens);
#if defined(__AVX512VNNI__)
    if (to.bytes) {
      if (chunk == 4) expand_span_bytes<4>(to, b, b1, j, y, next);
      if (chunk == 2) expand_span_bytes<2>(to, b, b1, j, y, next);
      if (chunk == 1) expand_span_bytes<1>(to, b, b1, j, y, next);
      j += chunk;
      continue;
    }
#endif
    if (chunk == 4) expand_span<4>(to, b, b1, j, y, next);
    if (chunk == 2) expand_span<2>(to, b, b1, j, y, next);
    if (chunk == 1) expand_span<1>(to, b, b1, j, y, next);
    j += chunk;
  }
}

void shrink_range(const Band &band, int64_t r0, int64_t r1, int64_t tokens, int64_t rank,
                  const float *x, int64_t ldx, const float *sums, int64_t lds,
                  const float *halves, int64_t ldh, float *t, Ahead &next) {
  const int64_t blocks = band.v.blocks;
  for (int64_t j = 0; j < tokens;) {
    const int64_t chunk = chunk_of(j, tokens);
    float *tj = t + j * rank + band.first * chunk;
#if defined(__AVX512VNNI__)
    if (halves && as_bytes(band.v)) {
      const float *hj = halves + j * ldh;
      if (chunk == 4) shrink_bytes_any<4>(band.v, r0, r1, hj, ldh, tj, next);
      if (chunk == 2) shrink_bytes_any<2>(band.v, r0, r1, hj, ldh, tj, next);
      if (chunk == 1) shrink_bytes_any<1>(band.v, r0, r1, hj, ldh, tj, next);
    } else
#endif
    {
      std::fill(tj + r0 * chunk, tj + r1 * chunk, 0.f);
      for (int64_t b = 0; b < blocks; b += CHUNK) {
        const int64_t b1 = std::min(blocks, b + CHUNK);
        const float *xj = x + j * ldx, *sj = sums + j * lds;
        if (chunk == 4) shrink_any<4>(band.v, r0, r1, b, b1, xj, ldx, sj, lds, tj, next);
        if (chunk == 2) shrink_any<2>(band.v, r0, r1, b, b1, xj, ldx, sj, lds, tj, next);
        if (chunk == 1) shrink_any<1>(band.v, r0, r1, b, b1, xj, ldx, sj, lds, tj, next);
      }
    }
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t i = 0; i < chunk; ++i) tj[r * chunk + i] *= band.singular(r);
    j += chunk;
  }
}

// The rows of one slot, what it holds, and where their t lie in the scratch.
struct Group {
  int64_t slot, first, tokens;  // first: place of the first row among those of all groups
  const Band *bands, *end;
  int64_t rank, t;
  size_t shrinks, expands;  // ends of its tasks
};

// Directions of a band whose t is to be made, or blocks of outputs of a part's bands.
struct Task {
  const Group *group;
  const Band *bands, *end;
  int64_t column, size, first, last;
};

// What a call has to do; a thread keeps the memory from call to call.
struct Work {
  std::vector<Group> groups;
  std::vector<int64_t> rows;  // of y, by slot
  std::vector<Band> bands;
  std::vector<Task> shrinks, expands;
  std::vector<int64_t> count;
  std::vector<float> memory;
  int64_t codes = 0;  // × rows

  float *scratch(int64_t floats) {
    if (int64_t(memory.size()) < floats) memory.resize(floats);
    return memory.data();
  }

  // Rows by slot. -1 if a slot is out of range, else the number of rows that have one.
  int64_t group(const int32_t *slot, int64_t tokens, int64_t slots) {
    groups.clear();
    shrinks.clear();
    expands.clear();
    bands.clear();
    codes = 0;
    int64_t live = 0;
    for (int64_t j = 0; j < tokens; ++j) {
      if (slot[j] < -1 || slot[j] >= slots) return -1;
      live += slot[j] >= 0;
    }
    if (!live) return 0;
    count.assign(slots, 0);
    for (int64_t j = 0; j < tokens; ++j)
      if (slot[j] >= 0) ++count[slot[j]];
    int64_t first = 0;
    for (int64_t s = 0; s < slots; ++s) {
      if (count[s]) groups.push_back({s, first, count[s], nullptr, nullptr, 0, 0, 0, 0});
      first += count[s];
      count[s] = first - count[s];  // from here on: where its next row goes
    }
    rows.resize(live);
    for (int64_t j = 0; j < tokens; ++j)
      if (slot[j] >= 0) rows[count[slot[j]]++] = j;
    return live;
  }

  // Reads what the slots of the groups hold; drops those that hold nothing. The floats of all t.
  int64_t read(const Table &table) {
    bands.reserve(groups.size() * table.parts * table.max_bands);  // they do not move from here on
    int64_t floats = 0;
    size_t kept = 0;
    for (Group g : groups) {
      g.bands = bands.data() + bands.size();
      table.read(g.slot, bands);
      g.end = bands.data() + bands.size();
      if (g.bands == g.end) continue;
      for (const Band *band = g.bands; band != g.end; ++band)
        g.rank = std::max(g.rank, band->first + band->count);
      g.t = floats;
      floats += g.rank * g.tokens;
      groups[kept++] = g;
    }
    groups.resize(kept);
    return floats;
  }

  // Blocks of outputs of some bands, as tasks of the last group that was begun.
  void expand(const Group &g, const Band *first, const Band *end, int64_t column, int64_t size,
              int64_t threads) {
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    // Where threads take whole groups, a task may be as large as it can.
    const int64_t shares = whole_groups(threads) ? 1 : 2 * threads;
    const int64_t span = std::clamp((blocks + shares - 1) / shares, SPAN, MAX_SPAN);
    for (int64_t b = 0; b < blocks; b += span)
      expands.push_back({&g, first, end, column, size, b, std::min(blocks, b + span)});
    for (; first != end; ++first) codes += first->count * size * g.tokens;
  }

  bool whole_groups(int64_t threads) const { return groups.size() >= 2 * size_t(threads); }

  // Widens rows, makes t, uses it, for each group. Of many groups a thread takes whole ones, so that
  // it waits for no other and knows what it reads next; the tasks of a few are shared out.
  template <class Widen, class Shrink, class Expand>
  void run(int64_t threads, bool with_u, Widen widen, Shrink shrink, Expand expand) {
    const int team = int(std::max<int64_t>(1, std::min(threads, codes / THREAD_WORK)));
    const size_t count = groups.size();
    if (team == 1 || whole_groups(team)) {
      std::atomic<size_t> claimed{0};
#pragma omp parallel num_threads(team) if (team > 1)
      {
        Ahead ahead{with_u};
        size_t i = claimed++;
        if (i < count) ahead.all(groups[i].bands, groups[i].end);
        for (size_t next; i < count; i = next) {
          next = claimed++;
          if (next < count) ahead.start(groups[next].bands, groups[next].end);
          const Group &g = groups[i];
          for (int64_t j = g.first; j < g.first + g.tokens; ++j) widen(j);
          for (size_t k = i ? groups[i - 1].shrinks : 0; k < g.shrinks; ++k, ahead.next())
            shrink(shrinks[k], ahead);
          for (size_t k = i ? groups[i - 1].expands : 0; k < g.expands; ++k, ahead.next())
            expand(expands[k], ahead);
        }
      }
      return;
    }
#pragma omp parallel num_threads(team)
    {
      Ahead ahead{with_u};
      for (const Group &g : groups) {
#pragma omp for nowait
        for (int64_t j = g.first; j < g.first + g.tokens; ++j) widen(j);
      }
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (const Task &task : shrinks) shrink(task, ahead);
#pragma omp for schedule(dynamic)
      for (const Task &task : expands) expand(task, ahead);
    }
  }
};
thread_local Work kept;

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
  Work &work = kept;
  const int64_t live = work.group(slot, tokens, slots);
  if (live <= 0) return live;
  const int64_t floats =
      work.read({blobs, slot_bytes, fields, slots, parts, max_bands, outs, in, group_size});
  if (work.groups.empty()) return live;
  const Matrix y{y_data, y_stride, y_bf16 != 0}, x{x_data, x_stride, x_bf16 != 0};
  const int64_t ldx = (in + BLOCK - 1) / BLOCK * BLOCK;
  const int64_t blocks = ldx / BLOCK, in_groups = (in + group_size - 1) / group_size;
  const int64_t ldh = x.bf16 ? halves_room(blocks, in_groups) : 0;
  const int64_t lds = ldh ? 0 : (in_groups + 15) / 16 * 16;
  float *x_TI = work.scratch(live * (ldx + ldh + lds) + floats);
  float *halves = x_TI + live * ldx, *sums = halves + live * ldh, *t = sums + live * lds;
  const int64_t *rows = work.rows.data();
  for (Group &g : work.groups) {
    const int64_t span = g.tokens > 32 ? 64 : 16;  // directions that use one piece of x from L1
    int64_t column = 0, part = 0;
    for (const Band *first = g.bands, *end; first != g.end; first = end) {
      for (; part < first->part; ++part) column += outs[part];
      for (end = first; end != g.end && end->part == part; ++end) {
        for (int64_t r = 0; r < end->count; r += span)
          work.shrinks.push_back({&g, end, end + 1, 0, in, r, std::min(end->count, r + span)});
        work.codes += end->count * in * g.tokens;
      }
      work.expand(g, first, end, column, outs[part], threads);
    }
    g.shrinks = work.shrinks.size();
    g.expands = work.expands.size();
  }
  work.run(
      threads, true,
      [&](int64_t j) {
        x.get(rows[j], in, x_TI + j * ldx, ldx);
        if (ldh) to_halves(x_TI + j * ldx, halves + j * ldh, blocks, in_groups, group_size);
        if (lds) sum_groups(x_TI + j * ldx, ldx, group_size, sums + j * lds, lds);
      },
      [&](const Task &task, Ahead &next) {
        const Group &g = *task.group;
        shrink_range(*task.bands, task.first, task.last, g.tokens, g.rank, x_TI + g.first * ldx,
                     ldx, sums + g.first * lds, lds, ldh ? halves + g.first * ldh : nullptr, ldh,
                     t + g.t, next);
      },
      [&](const Task &task, Ahead &next) {
        const Group &g = *task.group;
        const Target to{task.bands,  task.end,       true,     g.rank,  task.size,
                        task.column, rows + g.first, g.tokens, t + g.t,  x.bf16};
        expand_blocks(to, task.first, task.last, y, next);
      });
  return live;
}

// Writes directions r0 … r1 of a slot as bfloat16, a row each: entries n0 … n1 (n0 the first of a block)
// of their U, or of their V times the singular value. Those of a U are of one part.
int64_t deltacome_factor(uint16_t *to, int64_t of_u, int64_t r0, int64_t r1, int64_t n0, int64_t n1,
                         int64_t slot, const uint8_t *blobs, int64_t slot_bytes,
                         const int64_t *fields, int64_t slots, int64_t parts, int64_t max_bands,
                         const int64_t *outs, int64_t in, int64_t group_size, int64_t threads) {
  std::vector<Band> bands;
  Table{blobs, slot_bytes, fields, slots, parts, max_bands, outs, in, group_size}.read(slot, bands);
  const int64_t codes = (r1 - r0) * (n1 - n0);
  const int team = int(std::max<int64_t>(1, std::min(threads, codes / THREAD_WORK)));
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t r = r0; r < r1; ++r)
    for (const Band &band : bands)
      if (const int64_t own = r - band.first; own >= 0 && own < band.count)
        write_any(of_u ? band.u : band.v, own, n0, n1, of_u ? 1.f : band.singular(own),
                  to + (r - r0) * (n1 - n0));
  return codes;
}

// y (T, I) += scale · Σ Û[:, ids]ᵀ diag(s) V̂ with the bands of each row's slot. -1 if a slot is out of
// range, -2 if an id is no row; nothing is written then.
int64_t deltacome_band_rows(void *y_data, int64_t y_stride, int64_t y_bf16, const int64_t *ids,
                            const int32_t *slot, int64_t tokens, const uint8_t *blobs,
                            int64_t slot_bytes, const int64_t *fields, int64_t slots,
                            int64_t max_bands, int64_t out, int64_t in, int64_t group_size,
                            float scale, int64_t threads) {
  Work &work = kept;
  const int64_t live = work.group(slot, tokens, slots);
  if (live <= 0) return live;
  const int64_t floats =
      work.read({blobs, slot_bytes, fields, slots, 1, max_bands, &out, in, group_size});
  const int64_t *rows = work.rows.data();
  for (const Group &g : work.groups)
    for (int64_t j = g.first; j < g.first + g.tokens; ++j)
      if (ids[rows[j]] < 0 || ids[rows[j]] >= out) return -2;
  const Matrix y{y_data, y_stride, y_bf16 != 0};
  float *t = work.scratch(floats);
  for (Group &g : work.groups) {
    for (const Band *band = g.bands; band != g.end; ++band)
      work.shrinks.push_back({&g, band, band + 1, 0, out, 0, band->count});
    work.expand(g, g.bands, g.end, 0, in, threads);
    g.shrinks = work.shrinks.size();
    g.expands = work.expands.size();
  }
  work.run(
      threads, false, [](int64_t) {},
      [&](const Task &task, Ahead &) {
        const Group &g = *task.group;
        const Band &band = *task.bands;
        for (int64_t r = 0; r < band.count; ++r)
          for (int64_t j = 0; j < g.tokens;) {
            const int64_t chunk = chunk_of(j, g.tokens);
            float *tj = t + g.t + j * g.rank + (band.first + r) * chunk;
            for (int64_t i = 0; i < chunk; ++i)
              tj[i] = band.u.value(r, ids[rows[g.first + j + i]]) * (scale * band.singular(r));
            j += chunk;
          }
      },
      [&](const Task &task, Ahead &next) {
        const Group &g = *task.group;
        const Target to{task.bands, task.end,       false,    g.rank,  task.size,
                        0,          rows + g.first, g.tokens, t + g.t, y.bf16};
        expand_blocks(to, task.first, task.last, y, next);
      });
  return live;
}

// y[t, o] += α[o] · Σ ±x[t] with the signs of each row's slot; `fields` (slots, parts, SIGN_FIELDS).
// -1 as above.
int64_t deltacome_signs(void *y_data, int64_t y_stride, int64_t y_bf16, void *x_data,
                        int64_t x_stride, int64_t x_bf16, const int32_t *slot, int64_t tokens,
                        const uint8_t *blobs, int64_t slot_bytes, const int64_t *fields,
                        int64_t slots, int64_t parts, const int64_t *outs, int64_t in,
                        int64_t threads) {
  Work &work = kept;
  const int64_t live = work.group(slot, tokens, slots);
  if (live <= 0) return live;
  const Matrix y{y_data, y_stride, y_bf16 != 0}, x{x_data, x_stride, x_bf16 != 0};
  const int64_t ldx = (in + BLOCK - 1) / BLOCK * BLOCK;
  float *x_TI = work.scratch(live * ldx);
  const int64_t *rows = work.rows.data();
  for (Group &g : work.groups) {
    int64_t column = 0;
    for (int64_t p = 0; p < parts; column += outs[p++]) {
      if (!fields[(g.slot * parts + p) * SIGN_FIELDS + 2]) continue;
      for (int64_t o = 0; o < outs[p]; o += SIGN_ROWS)
        work.expands.push_back(
            {&g, nullptr, nullptr, column, p, o, std::min(outs[p], o + SIGN_ROWS)});
      work.codes += outs[p] * in * g.tokens;
    }
    g.expands = work.expands.size();
  }
  work.run(
      threads, true, [&](int64_t j) { x.get(rows[j], in, x_TI + j * ldx, ldx); },
      [](const Task &, Ahead &) {},
      [&](const Task &task, Ahead &) {
        const Group &g = *task.group;
        const int64_t *f = fields + (g.slot * parts + task.size) * SIGN_FIELDS;  // size: the part
        const uint8_t *base = blobs + g.slot * slot_bytes;
        for (int64_t j = 0; j < g.tokens;) {
          const int64_t chunk = chunk_of(j, g.tokens);
          const float *xj = x_TI + (g.first + j) * ldx;
          float tile[MAX_TOKENS][SIGN_ROWS];
          for (int64_t o = task.first; o < task.last; ++o) {
            float alpha, sums[MAX_TOKENS];
            std::memcpy(&alpha, base + f[1] + 4 * (f[2] > 1 ? o : 0), 4);
            const uint8_t *words = base + f[0] + o * (ldx / 8);
            if (chunk == 4) sign_sums<4>(words, ldx / BLOCK, xj, ldx, sums);
            if (chunk == 2) sign_sums<2>(words, ldx / BLOCK, xj, ldx, sums);
            if (chunk == 1) sign_sums<1>(words, ldx / BLOCK, xj, ldx, sums);
            for (int64_t i = 0; i < chunk; ++i) tile[i][o - task.first] = alpha * sums[i];
          }
          for (int64_t i = 0; i < chunk; ++i)
            y.add(rows[g.first + j + i], task.column + task.first, tile[i],
                  task.last - task.first);
          j += chunk;
        }
      });
  return live;
}

// y[t] = x[t] / √(mean(x[t]²) + eps) · w[slot] for rows that have a slot. -1 as above.
int64_t deltacome_norm(void *y_data, int64_t y_stride, int64_t y_bf16, void *x_data,
                       int64_t x_stride, int64_t x_bf16, const int32_t *slot, int64_t tokens,
                       const float *weights, int64_t slots, int64_t size, double eps) {
  for (int64_t j = 0; j < tokens; ++j)
    if (slot[j] < -1 || slot[j] >= slots) return -1;
  const Matrix y{y_data, y_stride, y_bf16 != 0}, x{x_data, x_stride, x_bf16 != 0};
  const int64_t room = (size + LANES - 1) / LANES * LANES;
  float *row = kept.scratch(room);
  for (int64_t j = 0; j < tokens; ++j) {
    if (slot[j] < 0) continue;
    x.get(j, size, row, room);
    vf lanes = {};
    for (int64_t n = 0; n < room; n += LANES) lanes += load(row + n) * load(row + n);
    const double squares = sum(lanes);
    const float factor = float(1 / std::sqrt(squares / size + eps));
    const float *w = weights + slot[j] * size;
    for (int64_t n = 0; n < size; ++n) row[n] = row[n] * factor * w[n];
    y.set(j, row, size);
  }
  return 0;
}
}

#include "native_torch.h"
