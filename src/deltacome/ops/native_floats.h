// Products with packed codes, as floats. `native.cpp` includes this among its own definitions.
//
// A block of 64 codes is V vectors. The layout of codes lets two instructions decode a vector: the
// words of a block, repeated over the lanes, hold consecutive codes, each at a place in its word that
// depends only on its place in the block (docs/format.md). Codes are not shifted down from there: what a
// mask leaves of a word, converted to a float, is the code times a power of two, which is divided out of
// the sums or the rows. Scales and zero points stay out of the innermost loops too: a scale multiplies
// a group's sum (shrink) or a direction's weight (expand), a zero point the sum of a group's inputs.
//
// Legend: as in native.cpp.

// The words that hold vector i of a block in a plane of P bits, repeated over the lanes.
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

// Where the codes of a plane of P bits lie in their words: the masks that keep them, and the factors that
// turn the result into codes. A vector with codes at the top of a word, where they would be
// read as a sign, is shifted down first.
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

// The codes of vector i of a block, each times 2^place.
template <int P>
inline vf in_place(const uint8_t *block, int i) {
  vu mask;
  std::memcpy(&mask, PLACES<P>.mask + i * LANES, sizeof mask);
  const vu word = words<P>(block, i) >> Places<P>::down(i);
  return __builtin_convertvector((vi)(word & mask), vf);
}

// The factors that bring the third bit of each code to the place of the other two.
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

// Vector i of block b of direction r: codes times 2^place, or values. Each vector is used as soon as it
// is decoded: with a whole block decoded first, a compiler runs out of registers.
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
    for (int64_t k = count; k < LANES; ++k) values[k] = 0;  // may be another direction's
    return load(values);
  }
}

// Directions of a large matrix lie pages apart, too far for the CPU to predict which line is next.
template <int BITS>
inline void prefetch(const Factor &f, int64_t r, int64_t b) {
  if constexpr (GRID<BITS>)
    __builtin_prefetch(f.low + (r * f.blocks + b) * 8 * PLANE<BITS>);
}

template <int BITS>
constexpr int BITS_OF = BITS == RAGGED ? 8 : BITS;

template <int BITS>
inline int64_t blocks_of_group(const Factor &f) {
  return GRID<BITS> ? f.group_size / BLOCK : f.blocks;
}

// Writes the sum of each group of a row, then zeros up to `room`; only zeros, which nothing uses, where
// groups cut through blocks.
void sum_groups(const float *x, int64_t size, int64_t group_size, float *sums, int64_t room) {
  std::fill(sums, sums + room, 0.f);
  if (group_size % BLOCK) return;
  for (int64_t n = 0, g = 0; n < size; ++g) {
    vf total = {};
    for (const int64_t end = std::min(size, n + group_size); n < end; n += LANES) total += load(x + n);
    sums[g] = sum(total);
  }
}

// total[j] −= Σ_g sums[j, g] · scale[r, g] · zero[r, g], a part of it in each lane. `sums` has the sum of
// each group of a row, then zeros up to a multiple of 16.
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

// t[r, j] += Σ_n x[j, n] · value[r, n] over blocks b0 … b1, for TT tokens. What zero points add over all
// blocks is added with the first block.
template <int BITS, int TT>
NOINLINE void shrink(const Factor f, int64_t r0, int64_t r1, int64_t b0, int64_t b1,
                     const float *x, int64_t ldx, const float *sums, int64_t lds, float *t,
                     Ahead &next) {
  constexpr int SUMS = TT == 1 ? std::min(V, 4) : 2;  // enough sums to hide the adder's latency
  const int32_t per_group = int32_t(blocks_of_group<BITS>(f));
  const int64_t g0 = int32_t(b0) / per_group, g1 = int32_t(b1 + per_group - 1) / per_group;
  const int64_t lines = (b1 - b0) * BITS_OF<BITS> / 8 + 1;  // cache lines of a direction
  // Rows are divided, once for all directions, by the powers of two that multiply the codes.
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

// The weight of each direction in up to 16 groups of TT tokens' outputs, and what zero points add there.
struct Weights {
  const float *at;      // (count, TT, apart)
  const float *offset;  // (TT, apart)
  int64_t first, apart;  // first: the first group

  static int64_t apart_of(int64_t groups) { return (groups + LANES - 1) / LANES * LANES; }
  static int64_t room(int64_t count, int64_t groups, int64_t tokens) {
    return (count + 1) * tokens * apart_of(groups);
  }
};

// `t` is (count, TT); `memory` has `Weights::room` floats.
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
// whose y lie ldy floats apart. Sums of W vectors of a block are held in registers at a time.
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

// Writes entries n … n1 of direction r, times `times`, as bfloat16; n is the first entry of a block.
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
      // A set bit flips the sign of −1.
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
