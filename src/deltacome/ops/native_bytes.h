// Products of few rows in bfloat16 with packed codes, by the CPU's dot products of bytes (AVX-512 VNNI).
// `native.cpp` includes this among its own definitions.
//
// One such instruction multiplies 64 one-byte codes by 64 signed bytes and adds the products in fours;
// with floats this takes four conversions and four multiplications. What multiplies the codes (a row, or
// the weights of directions in a row) therefore becomes 16-bit numbers, 256 · high + low, with a unit for
// each group: finer than bfloat16 where it counts, at a cost of two products. Sums of bytes are exact, in
// any order.
//
// The order of codes is the same for all widths: after each lane's shift, byte 4m + q of a block is code
// 16q + m (docs/format.md). Rows are laid out in that order; outputs are converted back from it.
//
// Legend: as in native.cpp; G groups of a direction, padded to a multiple of 16.

constexpr int64_t GROUPS = 16;        // groups whose scales or zero points fill a register
constexpr float LARGEST = 127 * 256;  // of the 16-bit numbers
constexpr float NOTHING = 1e-30f;     // anything smaller counts as 0

// Whether the codes of a factor are read as bytes.
inline bool as_bytes(const Factor &f) { return f.gridded(); }

inline vf as_floats(__m512i high, __m512i low) {
  const __m512 times = _mm512_set1_ps(256.f);
  return (vf)_mm512_fmadd_ps(_mm512_cvtepi32_ps(high), times, _mm512_cvtepi32_ps(low));
}

// The high bytes of 16-bit numbers; the low ones, also signed, are their lowest 8 bits.
inline __m512i upper(__m512i whole) {
  return _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
}

// Scales and zero points of up to 16 groups of a direction, 0 beyond.
struct Scales {
  vf scale, zero;

  Scales(const Factor &f, int64_t r, int64_t first, int64_t count) {
    const int64_t at = r * f.groups + first;
    const __mmask16 some = __mmask16((1u << count) - 1);
    scale = (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, f.scale + 2 * at));
    zero = (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, f.zero + at)));
  }
};

// How many bits to shift each lane by in planes of P bits, plus `more`.
template <int P>
inline __m512i lane_shift(int more = 0) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i place = P == 1   ? _mm512_srli_epi32(lane, 1)
                        : P == 2 ? _mm512_srli_epi32(lane, 2)
                                 : _mm512_srli_epi32(lane, 3);
  return _mm512_add_epi32(_mm512_mullo_epi32(place, _mm512_set1_epi32(P)), _mm512_set1_epi32(more));
}

// The codes of a block, one byte each, in the order above; `low` and `high` are its planes.
template <int BITS>
inline __m512i code_bytes(const uint8_t *low, const uint8_t *high) {
  constexpr int P = PLANE<BITS>;
  if constexpr (BITS == 8) {
    return _mm512_loadu_si512(low);
  } else {
    const __m512i mask = _mm512_set1_epi8(char((1 << P) - 1));
    const __m512i code = _mm512_srlv_epi32((__m512i)words<P>(low, 0), lane_shift<P>());
    if constexpr (BITS != 3) return _mm512_and_si512(code, mask);
    // The third bit goes to bit 2 of its byte, above the other two. 0xca selects either by the mask.
    const __m512i third = _mm512_rorv_epi32((__m512i)words<1>(high, 0), lane_shift<1>(-2));
    const __m512i both = _mm512_ternarylogic_epi32(mask, code, third, 0xca);
    return _mm512_and_si512(both, _mm512_set1_epi8(7));
  }
}

// A row of floats as bytes.
struct Halves {
  int8_t *high, *low;  // one for each place of each block
  float *unit, *sum;   // (G,): the unit of each group, and the sum of its numbers

  static int64_t groups(int64_t count) { return (count + GROUPS - 1) / GROUPS * GROUPS; }
  // How many floats a row takes.
  static int64_t room(int64_t blocks, int64_t groups_) {
    return 2 * blocks * BLOCK / 4 + 2 * groups(groups_);
  }
  Halves(float *memory, int64_t blocks, int64_t groups_)
      : high((int8_t *)memory), low(high + blocks * BLOCK),
        unit((float *)(low + blocks * BLOCK)), sum(unit + groups(groups_)) {}

  // `x` must be followed by zeros to the end of its last block.
  void set(const float *x, int64_t blocks, int64_t groups_, int64_t per_group) {
    std::fill(unit + groups_, unit + groups(groups_), 0.f);
    std::fill(sum + groups_, sum + groups(groups_), 0.f);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t b0 = g * per_group, b1 = std::min(blocks, b0 + per_group);
      vf most = {}, all = {};
      for (int64_t n = b0 * BLOCK; n < b1 * BLOCK; n += LANES) {
        const vf v = load(x + n);
        most = (vf)_mm512_max_ps((__m512)most, _mm512_abs_ps((__m512)v));
        all += v - v;  // NaN if a number is not finite
      }
      const float largest = _mm512_reduce_max_ps((__m512)most) + ::sum(all);
      const vf inverse = splat(largest > NOTHING ? LARGEST / largest : 0.f);
      vf total = {};
      for (int64_t b = b0; b < b1; ++b) {
        __m128i h[4], l[4];
        UNROLL
        for (int q = 0; q < 4; ++q) {
          const __m512i whole =
              _mm512_cvtps_epi32((__m512)(load(x + b * BLOCK + q * LANES) * inverse));
          total += (vf)_mm512_cvtepi32_ps(whole);
          h[q] = _mm512_cvtepi32_epi8(upper(whole));
          l[q] = _mm512_cvtepi32_epi8(whole);
        }
        _mm512_storeu_si512(high + b * BLOCK, interleave(h));
        _mm512_storeu_si512(low + b * BLOCK, interleave(l));
      }
      unit[g] = largest / LARGEST;  // or NaN
      sum[g] = ::sum(total);
    }
  }

  // Byte 4m + q of the result is byte m of part q.
  static __m512i interleave(const __m128i *part) {
    const __m128i a = _mm_unpacklo_epi8(part[0], part[1]), b = _mm_unpackhi_epi8(part[0], part[1]);
    const __m128i c = _mm_unpacklo_epi8(part[2], part[3]), d = _mm_unpackhi_epi8(part[2], part[3]);
    __m512i v = _mm512_castsi128_si512(_mm_unpacklo_epi16(a, c));
    v = _mm512_inserti32x4(v, _mm_unpackhi_epi16(a, c), 1);
    v = _mm512_inserti32x4(v, _mm_unpacklo_epi16(b, d), 2);
    return _mm512_inserti32x4(v, _mm_unpackhi_epi16(b, d), 3);
  }
};

// t[r, j] = Σ_n x[j, n] · value[r, n] for TT rows as bytes (`Halves`), `ld` floats apart. PER: the number
// of blocks in a group, or 0 if that number is a rare one.
template <int BITS, int TT, int PER>
NOINLINE void shrink_bytes(const Factor f, int64_t r0, int64_t r1, const float *x, int64_t ld,
                           float *t, Ahead &next) {
  const int64_t per_group = f.group_size / BLOCK;
  const int64_t lines = f.blocks * BITS / 8 + 1;  // cache lines of a direction
  for (int64_t r = r0; r < r1; ++r) {
    next.lines(lines);
    const int64_t at = r * f.blocks;
    vf total[TT] = {};
    for (int64_t g0 = 0; g0 < f.groups; g0 += GROUPS) {
      const int64_t count = std::min(GROUPS, f.groups - g0);
      const Scales of(f, r, g0, count);
      float unit[TT][GROUPS] __attribute__((aligned(64)));
      UNROLL
      for (int j = 0; j < TT; ++j) {
        const Halves row(const_cast<float *>(x) + j * ld, f.blocks, f.groups);
        const vf times = of.scale * load(row.unit + g0);
        store(unit[j], times);
        total[j] -= times * of.zero * load(row.sum + g0);
      }
      for (int64_t g = 0; g < count; ++g) {
        __m512i high[TT], low[TT];
        UNROLL
        for (int j = 0; j < TT; ++j) high[j] = low[j] = _mm512_setzero_si512();
        const auto add = [&](int64_t b) {
          const __m512i code = code_bytes<BITS>(
              f.low + (at + b) * 8 * PLANE<BITS>, f.high + (at + b) * 8);
          UNROLL
          for (int j = 0; j < TT; ++j) {
            const Halves row(const_cast<float *>(x) + j * ld, f.blocks, f.groups);
            high[j] = _mm512_dpbusd_epi32(high[j], code, _mm512_loadu_si512(row.high + b * BLOCK));
            low[j] = _mm512_dpbusd_epi32(low[j], code, _mm512_loadu_si512(row.low + b * BLOCK));
          }
        };
        const int64_t b0 = (g0 + g) * per_group, b1 = std::min(f.blocks, b0 + per_group);
        if (PER && b1 - b0 == PER)
          UNROLL
          for (int i = 0; i < PER; ++i) add(b0 + i);
        else
          for (int64_t b = b0; b < b1; ++b) add(b);
        UNROLL
        for (int j = 0; j < TT; ++j) total[j] += splat(unit[j][g]) * as_floats(high[j], low[j]);
      }
    }
    UNROLL
    for (int j = 0; j < TT; ++j) t[r * TT + j] = sum(total[j]);
  }
}

// The weight of each direction in each group of a row's outputs, as bytes, four directions to a word.
struct Mix {
  uint32_t *high, *low;  // (directions / 4, 16)
  vf unit, offset;       // of each group: the unit of its numbers, and what zero points add

  // For up to 16 groups from `first` on. t has one entry per direction, `stride` apart; `memory` has
  // `room(directions)` floats.
  Mix(const Factor &f, int64_t directions, int64_t first, int64_t count, const float *t,
      int64_t stride, float *memory) {
    float *weights = memory;
    const int64_t fours = (directions + 3) / 4;
    high = (uint32_t *)(memory + 4 * fours * GROUPS), low = high + fours * GROUPS;
    vf most = {};
    offset = vf{};
    for (int64_t r = 0; r < directions; ++r) {
      const Scales of(f, r, first, count);
      const vf weight = of.scale * t[r * stride];
      store(weights + r * GROUPS, weight);
      most = (vf)_mm512_max_ps((__m512)most, _mm512_abs_ps((__m512)weight));
      offset -= weight * of.zero;
    }
    offset += (offset - offset) * 0.f;
    for (int64_t r = directions; r < 4 * fours; ++r) store(weights + r * GROUPS, vf{});
    const vf inverse = most > NOTHING ? LARGEST / most : vf{};
    unit = most / LARGEST;
    const __m512i byte = _mm512_set1_epi32(0xff);
    for (int64_t q = 0; q < fours; ++q) {
      __m512i h = _mm512_setzero_si512(), l = h;
      UNROLL
      for (int i = 3; i >= 0; --i) {
        const __m512i whole =
            _mm512_cvtps_epi32((__m512)(load(weights + (4 * q + i) * GROUPS) * inverse));
        h = _mm512_or_si512(_mm512_slli_epi32(h, 8), _mm512_and_si512(upper(whole), byte));
        l = _mm512_or_si512(_mm512_slli_epi32(l, 8), _mm512_and_si512(whole, byte));
      }
      _mm512_storeu_si512(high + q * GROUPS, h);
      _mm512_storeu_si512(low + q * GROUPS, l);
    }
  }
  static int64_t room(int64_t directions) { return (directions + 3) / 4 * 6 * GROUPS; }
};

// The sums for one token's block of outputs, of high and of low bytes: four vectors each.
struct Sums {
  __m512i high[4], low[4];
};

// y += sums · unit + offset for one block, in the order of the outputs.
inline void add_sums(const Sums &sums, vf unit, vf offset, float *y) {
  __m512 v[4];
  UNROLL
  for (int i = 0; i < 4; ++i) v[i] = (__m512)(as_floats(sums.high[i], sums.low[i]) * unit + offset);
  // Lane 4m + q of vector i is output 16q + 4m + i, so fours are transposed.
  const __m512d a = (__m512d)_mm512_unpacklo_ps(v[0], v[1]);
  const __m512d b = (__m512d)_mm512_unpackhi_ps(v[0], v[1]);
  const __m512d c = (__m512d)_mm512_unpacklo_ps(v[2], v[3]);
  const __m512d d = (__m512d)_mm512_unpackhi_ps(v[2], v[3]);
  const vf out[4] = {(vf)_mm512_unpacklo_pd(a, c), (vf)_mm512_unpackhi_pd(a, c),
                     (vf)_mm512_unpacklo_pd(b, d), (vf)_mm512_unpackhi_pd(b, d)};
  UNROLL
  for (int i = 0; i < 4; ++i) store(y + i * LANES, load(y + i * LANES) + out[i]);
}

// Σ_q t[4q … 4q + 3, j] · codes of block b, over fours q0 … q1 of directions, for TT tokens, on top of
// `sums`, which holds those of the fours before q0. After the last four, the sums are added to y, whose
// tokens lie SPAN blocks apart; `lane` is the index of the block's group in `mix`.
template <int BITS, int TT>
NOINLINE void mix_bytes(const Factor &f, int64_t count, int64_t q0, int64_t q1, int64_t b,
                        const Mix *mix, int64_t lane, Sums *sums, float *y) {
  Sums s[TT];
  UNROLL
  for (int j = 0; j < TT; ++j)
    UNROLL
    for (int i = 0; i < 4; ++i) s[j].high[i] = s[j].low[i] = _mm512_setzero_si512();
  if (q0) {
    UNROLL
    for (int j = 0; j < TT; ++j) s[j] = sums[j];
  }
  const int64_t apart = f.blocks * 8, at = 4 * q0 * apart + b * 8;  // bytes of a plane of one bit
  const uint8_t *low = f.low + at * PLANE<BITS>, *high = f.high + at;
  int64_t to[4] = {0, apart, 2 * apart, 3 * apart};
  for (int64_t q = q0; q < q1; ++q, low += 4 * apart * PLANE<BITS>, high += 4 * apart) {
    if (4 * q + 4 > count)  // directions past the last weigh nothing
      for (int64_t i = count - 4 * q; i < 4; ++i) to[i] = 0;
    __m512i code[4], pair[4], four[4];
    UNROLL
    for (int i = 0; i < 4; ++i)
      code[i] = code_bytes<BITS>(low + to[i] * PLANE<BITS>, high + to[i]);
    pair[0] = _mm512_unpacklo_epi8(code[0], code[1]);
    pair[1] = _mm512_unpackhi_epi8(code[0], code[1]);
    pair[2] = _mm512_unpacklo_epi8(code[2], code[3]);
    pair[3] = _mm512_unpackhi_epi8(code[2], code[3]);
    four[0] = _mm512_unpacklo_epi16(pair[0], pair[2]);
    four[1] = _mm512_unpackhi_epi16(pair[0], pair[2]);
    four[2] = _mm512_unpacklo_epi16(pair[1], pair[3]);
    four[3] = _mm512_unpackhi_epi16(pair[1], pair[3]);
    UNROLL
    for (int j = 0; j < TT; ++j) {
      const __m512i h = _mm512_set1_epi32(int(mix[j].high[q * GROUPS + lane]));
      const __m512i l = _mm512_set1_epi32(int(mix[j].low[q * GROUPS + lane]));
      UNROLL
      for (int i = 0; i < 4; ++i) {
        s[j].high[i] = _mm512_dpbusd_epi32(s[j].high[i], four[i], h);
        s[j].low[i] = _mm512_dpbusd_epi32(s[j].low[i], four[i], l);
      }
    }
  }
  if (4 * q1 < count) {
    UNROLL
    for (int j = 0; j < TT; ++j) sums[j] = s[j];
    return;
  }
  UNROLL
  for (int j = 0; j < TT; ++j)
    add_sums(s[j], splat(mix[j].unit[lane]), splat(mix[j].offset[lane]), y + j * SPAN * BLOCK);
}

// How many fours of directions can each keep one line in an L1 cache of 8 ways of 4 KiB. Directions that
// lie a multiple of 4 KiB apart all fall into the same few places of it.
inline int64_t fours_in_cache(const Factor &f) {
  const int64_t apart = f.blocks * 8 * (f.bits == 3 ? 2 : f.bits), page = 4096;
  return std::clamp<int64_t>(8 * page / std::gcd(apart, page) / 4, 2, 16);
}

// tile[j, n, :] += Σ_r t[r, j] · value[r, block b + n, :] for up to SPAN blocks of TT tokens. A few
// directions are taken to the end of the cache lines that hold their codes before the next few are begun,
// since in a large matrix those lines would not stay in the cache.
template <int BITS, int TT>
NOINLINE void expand_bytes(const Factor f, int64_t count, int64_t b, int64_t blocks, const Mix *mix,
                           int64_t lane0, float *tile, Ahead &next) {
  constexpr int PAIR = std::min(TT, 2);  // tokens whose sums fit into registers
  const int64_t per_group = f.group_size / BLOCK, fours = (count + 3) / 4;
  const auto lane = [&](int64_t n) { return (b + n) / per_group - lane0; };
  const int64_t some = fours_in_cache(f);
  Sums sums[SPAN][TT];
  for (int64_t q = 0; q < fours; q += some) {
    const int64_t q1 = std::min(fours, q + some);
    next.lines((q1 - q) * (4 * blocks * BITS / 8 + 1));
    for (int64_t r = 4 * q1; r < std::min(count, 4 * (q1 + some)); ++r) prefetch<BITS>(f, r, b);
    for (int64_t n = 0; n < blocks; ++n)
      for (int j = 0; j < TT; j += PAIR)
        mix_bytes<BITS, PAIR>(f, count, q, q1, b + n, mix + j, lane(n), sums[n] + j,
                              tile + (j * SPAN + n) * BLOCK);
  }
}

template <int TT, int PER>
void shrink_bytes_by(const Factor &f, int64_t r0, int64_t r1, const float *x, int64_t ld, float *t,
                     Ahead &next) {
  switch (f.bits) {
    case 1: return shrink_bytes<1, TT, PER>(f, r0, r1, x, ld, t, next);
    case 2: return shrink_bytes<2, TT, PER>(f, r0, r1, x, ld, t, next);
    case 3: return shrink_bytes<3, TT, PER>(f, r0, r1, x, ld, t, next);
    case 4: return shrink_bytes<4, TT, PER>(f, r0, r1, x, ld, t, next);
    default: return shrink_bytes<8, TT, PER>(f, r0, r1, x, ld, t, next);
  }
}

template <int TT>
void shrink_bytes_any(const Factor &f, int64_t r0, int64_t r1, const float *x, int64_t ld, float *t,
                      Ahead &next) {
  if (f.group_size == 2 * BLOCK) return shrink_bytes_by<TT, 2>(f, r0, r1, x, ld, t, next);
  return shrink_bytes_by<TT, 0>(f, r0, r1, x, ld, t, next);
}

template <int TT>
void expand_bytes_any(const Factor &f, int64_t count, int64_t b, int64_t blocks, const Mix *mix,
                      int64_t lane0, float *tile, Ahead &next) {
  switch (f.bits) {
    case 1: return expand_bytes<1, TT>(f, count, b, blocks, mix, lane0, tile, next);
    case 2: return expand_bytes<2, TT>(f, count, b, blocks, mix, lane0, tile, next);
    case 3: return expand_bytes<3, TT>(f, count, b, blocks, mix, lane0, tile, next);
    case 4: return expand_bytes<4, TT>(f, count, b, blocks, mix, lane0, tile, next);
    default: return expand_bytes<8, TT>(f, count, b, blocks, mix, lane0, tile, next);
  }
}

// What a thread keeps from call to call.
thread_local std::vector<Mix> mixes;
thread_local std::vector<float> mix_memory;

// Whether the directions of a band are mixed as bytes; fewer than 4 are not worth a mix.
inline bool mixed(const Target &to, const Band *band) {
  return band->count >= 4 && as_bytes(to.factor(band));
}

// Makes a mix for each band that is read as bytes and each token from j on, for blocks b … b1.
void make_mixes(const Target &to, int64_t b, int64_t b1, int64_t j, int64_t tokens) {
  mixes.clear();
  int64_t room = 0;
  for (const Band *band = to.bands; band != to.end; ++band)
    if (mixed(to, band)) room += Mix::room(band->count) * tokens;
  if (int64_t(mix_memory.size()) < room) mix_memory.resize(room);
  float *memory = mix_memory.data();
  for (const Band *band = to.bands; band != to.end; ++band) {
    if (!mixed(to, band)) continue;
    const Factor &f = to.factor(band);
    const int64_t per_group = f.group_size / BLOCK, first = b / per_group;
    const int64_t groups = (b1 - 1) / per_group + 1 - first;
    const float *t = to.t + j * to.rank + band->first * tokens;
    for (int64_t i = 0; i < tokens; ++i, memory += Mix::room(band->count))
      mixes.emplace_back(f, band->count, first, groups, t + i, tokens, memory);
  }
}

// `expand_span`, with bytes where a factor allows it.
template <int TT>
void expand_span_bytes(const Target &to, int64_t b, int64_t b1, int64_t j, const Matrix &y,
                       Ahead &next) {
  make_mixes(to, b, b1, j, TT);
  weigh<TT>(to, b, b1, j, [&](const Band *band) { return !mixed(to, band); });
  for (int64_t at = b; at < b1; at += SPAN) {
    const int64_t blocks = std::min(SPAN, b1 - at);
    float tile[TT * SPAN * BLOCK] __attribute__((aligned(64))) = {};
    const Mix *mix = mixes.data();
    const Weights *weights = weighed.data();
    for (const Band *band = to.bands; band != to.end; ++band) {
      const Factor &f = to.factor(band);
      if (mixed(to, band)) {
        const int64_t lane0 = b / (f.group_size / BLOCK);
        expand_bytes_any<TT>(f, band->count, at, blocks, mix, lane0, tile, next);
        mix += TT;
        continue;
      }
      expand_floats<TT>(f, band->count, at, blocks, *weights++, tile, next);
    }
    const int64_t first = at * BLOCK, count = std::min(blocks * BLOCK, to.size - first);
    for (int i = 0; i < TT; ++i)
      y.add(to.rows[j + i], to.column + first, tile + i * SPAN * BLOCK, count);
  }
}

inline int64_t halves_room(int64_t blocks, int64_t groups) { return Halves::room(blocks, groups); }
inline void to_halves(const float *x, float *to, int64_t blocks, int64_t groups, int64_t size) {
  if (size % BLOCK == 0) Halves(to, blocks, groups).set(x, blocks, groups, size / BLOCK);
}
