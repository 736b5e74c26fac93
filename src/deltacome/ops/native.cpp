// The ops on a CPU, from packed codes; `native.py` says why it is built this way.
//
// Compiled once per instruction set, each time into a library of its own; the compiler's flags determine
// the width of a vector (`native_vectors.h`). Codes become floats (`native_floats.h`), or bytes where the
// CPU has dot products of bytes (`native_bytes.h`), and are decoded once for a chunk of up to 4 tokens.
// A thread prefetches what it reads next while it sums (`Ahead`).
//
// Sums never depend on the number of threads: each direction, and each block of outputs, is summed by
// one thread in a fixed order.
//
// Legend: T tokens, R directions, N entries of a direction, one float per lane.

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

#include "native_vectors.h"

constexpr int64_t CHUNK = 32;             // blocks of inputs that stay in the L1 cache for 4 tokens
constexpr int64_t MAX_TOKENS = 4;         // tokens that share one decoding
constexpr int64_t THREAD_WORK = 1 << 17;  // codes × tokens worth waking a thread for
constexpr int64_t AHEAD = 16;             // directions between a prefetch and its use
constexpr int64_t SPAN = 4;               // blocks of outputs whose 2-bit codes fill a cache line
constexpr int64_t MAX_SPAN = 16;          // blocks of a task: that many groups fill a register
constexpr int64_t SIGN_ROWS = 16;         // rows of a task of signs
constexpr int64_t SIGN_FIELDS = 3;        // offsets of words and scales, number of scales
constexpr int RAGGED = 0;                 // stands for any width where groups cut through blocks

struct Factor {
  int64_t bits, directions, size, blocks, groups, group_size;
  const uint8_t *low, *high, *scale, *zero;  // at 16 bits, `low` holds the values

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

  // One entry, for any width and any group size.
  float value(int64_t r, int64_t n) const {
    if (bits == 16) return from_half(half(low, r * size + n));
    uint32_t code = digit(low, bits == 3 ? 2 : int(bits), r, n);
    if (bits == 3) code |= digit(high, 1, r, n) << 2;
    const int64_t g = r * groups + n / group_size;
    return (float(code) - float(zero[g])) * from_half(half(scale, g));
  }

  // Whether the codes of a block share one scale: not at 16 bits, nor where groups cut through blocks.
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

// The bytes that this thread reads next, prefetched during its sums as fast as it uses up those that it
// has. A tenant's part of a layer is some kilobytes, which end before the CPU's own prefetcher has
// fetched much of them.
struct Ahead {
  bool with_u;  // false for rows of an embedding, which read only scattered codes of U
  const struct Band *band = nullptr, *last = nullptr;
  const uint8_t *at = nullptr, *end = nullptr;

  void start(const Band *first, const Band *last);
  void all(const Band *first, const Band *last);
  void next();
  void lines(int64_t count) {
    if (at >= end) return;
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at + 64 * i, 0, 2);  // may pass the end
    at += 64 * count;
  }
};

#include "native_floats.h"

struct Band {
  int64_t part, count, first;  // first: directions of its slot that come before it
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

// What the slots of a pool hold for one layer; `fields` are laid out as in ops/slots.py.
struct Table {
  const uint8_t *blobs;
  int64_t slot_bytes;
  const int64_t *fields;
  int64_t slots, parts, max_bands;
  const int64_t *outs;  // rows of each part
  int64_t in, group_size;

  static constexpr int FIELDS = 12;  // of a band: bits, count, first, V (4), U (4), s

  // Appends the bands of a slot, part by part.
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

// How many tokens from j on share one decoding: 4, 2 or 1. The t of such a chunk is contiguous, (R, TT)
// from j · R on, so that expanding reads it in order.
inline int64_t chunk_of(int64_t j, int64_t tokens) {
  const int64_t left = tokens - j;
  return left >= MAX_TOKENS ? MAX_TOKENS : left >= 2 ? 2 : 1;
}

// What is expanded, and into what: one part's outputs for one tenant's rows, or all inputs for rows of an
// embedding.
struct Target {
  const Band *bands, *end;
  bool with_u;
  int64_t rank, size, column;  // column: the first column in y
  const int64_t *rows;         // of y
  int64_t tokens;
  const float *t;
  bool bytes;  // whether factors are read as bytes where they can be (native_bytes.h)

  const Factor &factor(const Band *band) const { return with_u ? band->u : band->v; }
};

// What a thread keeps from call to call.
thread_local std::vector<Weights> weighed;
thread_local std::vector<float> weight_memory;

// Computes the weights of each band that is read as floats, for TT tokens from j on and blocks b … b1.
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

// Adds blocks b … b1 of the outputs of TT tokens from j on to y, SPAN blocks at a time.
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

// The rows of one slot, the bands that it holds, and where the t of these rows lies in the scratch.
struct Group {
  int64_t slot, first, tokens;  // first: index of the first row among those of all groups
  const Band *bands, *end;
  int64_t rank, t;
  size_t shrinks, expands;  // where its tasks end
};

// Directions of a band for which t is to be computed, or blocks of outputs of a part's bands.
struct Task {
  const Group *group;
  const Band *bands, *end;
  int64_t column, size, first, last;
};

// What a call has to do. Each thread keeps the memory from call to call.
struct Work {
  std::vector<Group> groups;
  std::vector<int64_t> rows;  // of y, sorted by slot
  std::vector<Band> bands;
  std::vector<Task> shrinks, expands;
  std::vector<int64_t> count;
  std::vector<float> memory;
  int64_t codes = 0;  // codes × rows, over all tasks

  float *scratch(int64_t floats) {
    // Memory that a long prompt took is freed when a single token follows, not between layers.
    if (int64_t(memory.size()) > 16 * std::max<int64_t>(floats, 1 << 20))
      std::vector<float>().swap(memory);
    if (int64_t(memory.size()) < floats) memory.resize(floats);
    return memory.data();
  }

  // Sorts rows by slot. Returns -1 if a slot is out of range, else the number of rows that have a slot.
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
      count[s] = first - count[s];  // from here on: where the slot's next row goes
    }
    rows.resize(live);
    for (int64_t j = 0; j < tokens; ++j)
      if (slot[j] >= 0) rows[count[slot[j]]++] = j;
    return live;
  }

  // Reads the bands of each group's slot and drops groups that have none. Returns the floats of all t.
  int64_t read(const Table &table) {
    bands.reserve(groups.size() * table.parts * table.max_bands);  // bands don't move from here on
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

  // Adds the blocks of outputs of some bands as tasks of the last group that was begun.
  void expand(const Group &g, const Band *first, const Band *end, int64_t column, int64_t size,
              int64_t threads) {
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    // Where threads take whole groups, a task may be as large as possible.
    const int64_t shares = whole_groups(threads) ? 1 : 2 * threads;
    const int64_t span = std::clamp((blocks + shares - 1) / shares, SPAN, MAX_SPAN);
    for (int64_t b = 0; b < blocks; b += span)
      expands.push_back({&g, first, end, column, size, b, std::min(blocks, b + span)});
    for (; first != end; ++first) codes += first->count * size * g.tokens;
  }

  bool whole_groups(int64_t threads) const { return groups.size() >= 2 * size_t(threads); }

  // For each group: widens rows, computes t and expands it. If there are many groups, threads take whole
  // ones, so that none waits for another and each knows what it reads next; if there are few, their tasks
  // are shared out.
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

// y (T, O) += Σ ((x V̂ᵀ) · s) Û with the bands of each row's slot. Returns -1, and writes nothing, if a
// slot is out of range.
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
    const int64_t span = g.tokens > 32 ? 64 : 16;  // directions that read one piece of x from L1
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

// Writes directions r0 … r1 of a slot as bfloat16, one row each: entries n0 … n1 of U, or of V times the
// singular value. n0 is the first entry of a block. For U, all directions belong to one part.
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

// y (T, I) += scale · Σ Û[:, ids]ᵀ diag(s) V̂ with the bands of each row's slot. Returns -1 if a slot is
// out of range, -2 if an id is; nothing is written then.
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

// y[t, o] += α[o] · Σ ±x[t] with the signs of each row's slot; `fields` is (slots, parts, SIGN_FIELDS).
// Returns -1 as above.
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

// y[t] = x[t] / √(mean(x[t]²) + eps) · w[slot] for rows that have a slot. Returns -1 as above.
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
