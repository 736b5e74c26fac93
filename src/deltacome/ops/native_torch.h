// Ops as torch calls them: from its dispatcher to the kernels, with no Python in between. `native.cpp`
// includes this last. A call through Python and ctypes takes as long as a small layer's delta.
//
// It uses torch's stable C interface (2.10 and newer), whose functions `native.py` passes in by address:
// nothing here is compiled against torch or linked with it. Each op gets its arguments on a stack of
// 64-bit words and owns those that are handles.
//
// Only plain calls are handled here: few rows, on the CPU, laid out as the kernels read them. Any other
// call, and any that is to be refused, is passed on unchanged to the op in Python, `<op>_python`.

namespace {

typedef void *Handle;

// In the order of _TORCH in native.py.
struct Torch {
  int32_t (*library)(const char *space, const char *key, const char *file, uint32_t line, Handle *);
  int32_t (*implement)(Handle, const char *op, void (*)(uint64_t *, uint64_t, uint64_t), uint64_t);
  int32_t (*call)(const char *op, const char *overload, uint64_t *stack, uint64_t version);
  int32_t (*device)(Handle, int32_t *);
  int32_t (*dtype)(Handle, int32_t *);
  int32_t (*dim)(Handle, int64_t *);
  int32_t (*sizes)(Handle, int64_t **);
  int32_t (*strides)(Handle, int64_t **);
  int32_t (*data)(Handle, void **);
  int32_t (*length)(Handle, size_t *);
  int32_t (*item)(Handle, size_t, uint64_t *);
  int32_t (*text)(Handle, const char **);
  int32_t (*drop_tensor)(Handle);
  int32_t (*drop_list)(Handle);
  int32_t (*drop_text)(Handle);
  int32_t (*threads)(uint32_t *);
} torch;

constexpr uint64_t VERSION = (2ull << 56) | (10ull << 48);  // of the interface
constexpr int32_t CPU = 0, U8 = 0, I32 = 3, I64 = 4, F32 = 6, BF16 = 15;  // as torch numbers them
std::atomic<int64_t> few_rows{0};  // batches of fewer rows are handled here

// A tensor on the CPU; for any other, `there` is false.
struct View {
  bool there;
  void *data = nullptr;
  int32_t type = -1;
  int64_t dim = 0, *size = nullptr, *stride = nullptr;

  explicit View(uint64_t word) {
    const Handle handle = (Handle)word;
    int32_t where = -1;
    there = !torch.device(handle, &where) && where == CPU && !torch.data(handle, &data) &&
            !torch.dtype(handle, &type) && !torch.dim(handle, &dim) &&
            !torch.sizes(handle, &size) && !torch.strides(handle, &stride);
  }
  bool is(int32_t type_, int64_t dim_) const {  // and contiguous
    if (!there || type != type_ || dim != dim_) return false;
    int64_t expected = 1;
    for (int64_t d = dim - 1; d >= 0; expected *= size[d--])
      if (size[d] != 1 && stride[d] != expected) return false;
    return true;
  }
  // As in `native.readable`.
  bool readable() const {
    return there && dim == 2 && (type == F32 || type == BF16) && size[1] > 0 &&
           (size[1] == 1 || stride[1] == 1) && (size[0] <= 1 || stride[0] >= size[1]);
  }
};

// The integers of a list; fewer than it has if it is too long.
struct Sizes {
  int64_t at[16], sum = 0;
  size_t count = 0;

  explicit Sizes(uint64_t word) {
    size_t length = 0;
    if (torch.length((Handle)word, &length) || length > 16) return;
    for (uint64_t item; count < length; sum += at[count++]) {
      if (torch.item((Handle)word, count, &item)) break;
      at[count] = int64_t(item);
    }
  }
};

inline bool is_cpu(uint64_t word) {
  const char *text;
  return !torch.text((Handle)word, &text) && !std::strcmp(text, "cpu");
}

inline int64_t threads() {
  uint32_t count = 1;
  torch.threads(&count);
  return count;
}

// The slots of y's rows: whether the kernels can walk them here, and whether no row has one.
struct Slots {
  bool walkable = false, nobody = false;
  int64_t rows = 0;
  const int32_t *data = nullptr;

  explicit Slots(uint64_t word) {
    const View slot(word);
    if (!slot.is(I32, 1) || !slot.size[0]) return;
    data = (const int32_t *)slot.data, rows = slot.size[0];
    nobody = *std::max_element(data, data + rows) < 0;
    walkable = rows < few_rows;
  }
};

// The arguments that `bands` and `signs` both begin with: y, x, slot, order, tiles, blobs, fields, outs.
struct Linear {
  View y, x, blobs, fields;
  Sizes outs;
  int64_t rows;

  Linear(const uint64_t *stack, const Slots &slot)
      : y(stack[0]), x(stack[1]), blobs(stack[5]), fields(stack[6]), outs(stack[7]),
        rows(slot.rows) {}

  // Whether the kernels can walk them; `fields` must have `dim` dimensions, the last of size `count`.
  bool fits(int64_t dim, int64_t count) const {
    return y.readable() && x.readable() && blobs.is(U8, 2) && fields.is(I64, dim) &&
           y.size[0] == rows && x.size[0] == rows && y.size[1] == outs.sum &&
           fields.size[0] == blobs.size[0] && fields.size[1] == int64_t(outs.count) &&
           fields.size[dim - 1] == count;
  }
};

bool bands_here(const uint64_t *stack) {
  const Slots slot(stack[2]);
  if (slot.nobody) return true;
  if (!slot.walkable || !is_cpu(stack[11])) return false;
  const Linear a(stack, slot);
  return a.fits(4, Table::FIELDS) &&
         deltacome_bands(a.y.data, a.y.stride[0], a.y.type == BF16, a.x.data, a.x.stride[0],
                         a.x.type == BF16, slot.data, slot.rows, (const uint8_t *)a.blobs.data,
                         a.blobs.size[1], (const int64_t *)a.fields.data, a.fields.size[0],
                         a.fields.size[1], a.fields.size[2], a.outs.at, a.x.size[1],
                         int64_t(stack[10]), threads()) >= 0;
}

bool signs_here(const uint64_t *stack) {
  const Slots slot(stack[2]);
  if (slot.nobody) return true;
  if (!slot.walkable || !is_cpu(stack[9])) return false;
  const Linear a(stack, slot);
  return a.fits(3, SIGN_FIELDS) &&
         deltacome_signs(a.y.data, a.y.stride[0], a.y.type == BF16, a.x.data, a.x.stride[0],
                         a.x.type == BF16, slot.data, slot.rows, (const uint8_t *)a.blobs.data,
                         a.blobs.size[1], (const int64_t *)a.fields.data, a.fields.size[0],
                         a.fields.size[1], a.outs.at, a.x.size[1], threads()) >= 0;
}

bool norm_here(const uint64_t *stack) {
  const Slots slot(stack[2]);
  if (slot.nobody) return true;
  if (!slot.walkable || !is_cpu(stack[5])) return false;
  const View y(stack[0]), x(stack[1]), weights(stack[3]);
  double eps;
  std::memcpy(&eps, &stack[4], sizeof eps);
  return y.readable() && x.readable() && weights.is(F32, 2) && y.size[0] == slot.rows &&
         x.size[0] == slot.rows && y.size[1] == x.size[1] && y.size[1] == weights.size[1] &&
         deltacome_norm(y.data, y.stride[0], y.type == BF16, x.data, x.stride[0], x.type == BF16,
                        slot.data, slot.rows, (const float *)weights.data, weights.size[0],
                        y.size[1], eps) >= 0;
}

// One op. KINDS has a letter for each argument: tensor, list, string or number.
template <bool (*HERE)(const uint64_t *), const char *NAME, const char *KINDS>
void op(uint64_t *stack, uint64_t, uint64_t) {
  if (HERE(stack)) {
    for (int i = 0; KINDS[i]; ++i) {
      if (KINDS[i] == 't') torch.drop_tensor((Handle)stack[i]);
      if (KINDS[i] == 'l') torch.drop_list((Handle)stack[i]);
      if (KINDS[i] == 's') torch.drop_text((Handle)stack[i]);
    }
  } else if (torch.call(NAME, "", stack, VERSION)) {
    throw std::runtime_error(std::string(NAME) + " refused");  // `run` in native.py looks for this
  }
}

constexpr char BANDS[] = "deltacome::bands_python", BANDS_KINDS[] = "tttttttlnnns";
constexpr char SIGNS[] = "deltacome::signs_python", SIGNS_KINDS[] = "tttttttlns";
constexpr char NORM[] = "deltacome::norm_python", NORM_KINDS[] = "ttttns";

}  // namespace

extern "C" {

// Takes over the ops for tensors on the CPU, for good; `functions` are those of `Torch`, in its order.
// Returns a value other than 0 if torch refuses.
int64_t deltacome_take_over(const void *functions) {
  std::memcpy(&torch, functions, sizeof torch);
  Handle library;
  return torch.library("deltacome", "CPU", __FILE__, __LINE__, &library) ||
         torch.implement(library, "bands", op<bands_here, BANDS, BANDS_KINDS>, VERSION) ||
         torch.implement(library, "signs", op<signs_here, SIGNS, SIGNS_KINDS>, VERSION) ||
         torch.implement(library, "norm", op<norm_here, NORM, NORM_KINDS>, VERSION);
}

// Leaves batches of this many rows or more to Python; returns the previous number.
int64_t deltacome_few_rows(int64_t rows) { return few_rows.exchange(rows); }
}
