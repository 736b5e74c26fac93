// Vectors of an instruction set, and conversions between floats and numbers of 16 or 8 bits. `native.cpp`
// includes this among its own definitions.

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

// Arrays of vectors stay in registers only if the loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 16")
// Each kernel stays a function of its own, so that a profile names it.
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
  // Halves are added, so that the order is that of a tree.
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

inline uint16_t to_bf16(float f) {  // rounds to nearest even
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
  // Multiplying moves the exponent, and is right for subnormal halves too.
  uint32_t bits = uint32_t(h & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  return h & 0x8000 ? -f : f;
#endif
}

// Converts the first `count` of up to 16 numbers to floats; up to `left` may be read. `to` has room for
// 16, and the rest of its last vector is finite.
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
