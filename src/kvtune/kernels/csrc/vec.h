// Vectors of WIDTH 32-bit lanes by compiler vector extensions, number formats, exp.
// Included inside the namespace of one instruction set: nothing here has external linkage, so that no
// function compiled for a newer machine is ever picked by the linker for an older one.

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float VF __attribute__((vector_size(4 * WIDTH)));
typedef int32_t VI __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t VU __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t VH __attribute__((vector_size(2 * WIDTH)));
typedef int8_t VB __attribute__((vector_size(WIDTH)));

#define KV_INLINE static inline __attribute__((always_inline))

template <class V> KV_INLINE V load(const void* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class V> KV_INLINE void store(void* p, V x) { __builtin_memcpy(p, &x, sizeof x); }
KV_INLINE VF splat(float x) {
  VF v;
  for (int i = 0; i < WIDTH; i++) v[i] = x;
  return v;
}
KV_INLINE VF as_float(VU x) { return (VF)x; }
KV_INLINE VF to_float(VI x) { return __builtin_convertvector(x, VF); }
KV_INLINE VF select(VI mask, VF yes, VF no) { return mask ? yes : no; }
KV_INLINE float max_of(float a, float b) { return a > b ? a : b; }
KV_INLINE int min_of(int a, int b) { return a < b ? a : b; }
KV_INLINE int max_of(int a, int b) { return a > b ? a : b; }

KV_INLINE VI lane_index() {
  VI x{};
  for (int i = 0; i < WIDTH; i++) x[i] = i;
  return x;
}

// The upper half of the first `N` lanes over the lower half; the rest is not used.
template <int N, class V> KV_INLINE V upper_half(V x) {
  V y{};
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  if constexpr (N == 16 && WIDTH == 16)
    y = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  else if constexpr (WIDTH == 16)
    y = __builtin_shufflevector(x, x, N / 2, N / 2 + 1, N / 2 + 2, N / 2 + 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  else if constexpr (WIDTH == 8)
    y = __builtin_shufflevector(x, x, N / 2, N / 2 + 1, N / 2 + 2, N / 2 + 3, 4, 5, 6, 7);
  else
    y = __builtin_shufflevector(x, x, N / 2, N / 2 + 1, 2, 3);
#else
  for (int i = 0; i < N / 2; i++) y[i] = x[i + N / 2];
#endif
  return y;
}

// Trees, in one fixed order.
template <int N = WIDTH> KV_INLINE float horizontal_sum(VF x) {
  if constexpr (N == 1) return x[0];
  else return horizontal_sum<N / 2>(x + upper_half<N>(x));
}
template <int N = WIDTH> KV_INLINE int32_t horizontal_sum(VI x) {
  if constexpr (N == 1) return x[0];
  else return horizontal_sum<N / 2>(x + upper_half<N>(x));
}
template <int N = WIDTH> KV_INLINE float horizontal_max(VF x) {
  if constexpr (N == 1) return x[0];
  else {
    const VF y = upper_half<N>(x);
    return horizontal_max<N / 2>(select(y > x, y, x));
  }
}

KV_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
KV_INLINE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// Nearest even; every NaN is 0x7fc0.
KV_INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

KV_INLINE const uint16_t* bf16_row(const KvRows& rows, int64_t row, int head) {
  return static_cast<const uint16_t*>(rows.data) + row * rows.row_stride + head * rows.head_stride;
}
// One row and head as floats.
KV_INLINE void read_row(const KvRows& rows, int64_t row, int head, int dim, float* out) {
  if (!rows.is_bf16) {
    const float* source = static_cast<const float*>(rows.data) + row * rows.row_stride + head * rows.head_stride;
    __builtin_memcpy(out, source, static_cast<std::size_t>(dim) * 4);
    return;
  }
  const uint16_t* source = bf16_row(rows, row, head);
  for (int d = 0; d < dim; d++) out[d] = float_of(static_cast<uint32_t>(source[d]) << 16);
}

// fp16 in the low 16 bits of each lane -> float. Exact, subnormals included; inf and NaN stay what they are.
KV_INLINE VF half_to_float(VU h) {
  const VU magnitude = (h & 0x7fffu) << 13;
  const VU sign = (h & 0x8000u) << 16;
  const VU special = (VU)(magnitude >= 0x0f800000u) & 0x7f800000u;
  const VF value = (VF)magnitude * 0x1p112f;
  return (VF)((VU)value | special | sign);
}

KV_INLINE VF load_halves(const uint16_t* p) {
#ifdef KV_VNNI
  return (VF)_mm512_cvtph_ps(load<__m256i>(p));
#else
  return half_to_float(__builtin_convertvector(load<VH>(p), VU));
#endif
}

KV_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  uint32_t bits = magnitude;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  __builtin_memcpy(&bits, &value, 4);
  bits |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | static_cast<uint32_t>(h & 0x8000) << 16;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// e^(x - n ln 2) for n the whole number next to x / ln 2 (Cephes).
KV_INLINE VF exp_of_rest(VF x, VF n) {
  VF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// e^x for x up to 30; 0 far below -87, NaN for NaN. Relative error below 2e-7.
#ifdef KV_VNNI
KV_INLINE VF exp_of(VF x) {
  const VF y = (VF)_mm512_max_ps(_mm512_set1_ps(-110.0f), (__m512)x);  // the second where one is NaN
  const VF n = (VF)_mm512_roundscale_ps((__m512)(y * 1.44269504f), 0);
  const VF p = exp_of_rest(y, n);
  return (VF)_mm512_scalef_ps((__m512)p, (__m512)n);
}
#else
KV_INLINE VF exp_of(VF x) {
  const VF shifted = x * 1.44269504f + 12582912.0f;
  const VF n = shifted - 12582912.0f;
  const VF p = exp_of_rest(x, n);
  const VI exponent = ((VI)shifted - 0x4b400000) << 23;
  const VF y = (VF)((VI)p + exponent);
  // A NaN survives the polynomial, but its bits may not survive the exponent: select it back.
  return select(x < -87.0f, VF{}, select(x == x, y, x));
}
#endif

KV_INLINE float exp_of(float x) { return exp_of(splat(x))[0]; }

// ---- forms: how the codes of a group are read --------------------------------------------------------------
//
// A form is the KvCodec whose codes look the same: KV_INT4 for KV_INT4_RH too, and KV_N4_RH for KV_N8_RH whose
// low plane is not there; or BF16_DOT, bf16 multiplied as such instead of in float. Value of a code c:
// step x (c - offset_of_codes) + base, both from the strip.
//
// The offset centres codes. Fixed-point products need it: the rounding of weights times a code's mean would be an
// error common to all dims, which the rotation gathers in one of them.
//
// PANEL | form is the same, once unpacked for many rows: codes as bytes where products are of bytes, else as floats;
// forms that have nothing to unpack stay where they are.

constexpr int BF16_DOT = 9;
constexpr int PANEL = 16;
constexpr int NUM_FORMS = 9;
constexpr int base_form(int form) { return form & (PANEL - 1); }
constexpr bool is_panel(int form) { return form >= PANEL; }
constexpr int form_index(int form) { return base_form(form) < KV_INT4_RH ? base_form(form) : base_form(form) - 1; }
KV_INLINE int form_of(int codec, bool has_low) {
  return codec == KV_INT4_RH ? KV_INT4 : codec == KV_N8_RH && !has_low ? KV_N4_RH : codec;
}
constexpr bool has_scale(int form) { return base_form(form) >= KV_INT8 && base_form(form) != BF16_DOT; }
constexpr bool has_base(int form) {
  return has_scale(form) && base_form(form) != KV_INT8 && base_form(form) != KV_FP8;
}
constexpr bool is_integer(int form) { return has_scale(form) && base_form(form) != KV_FP8; }
constexpr bool is_rotated(int codec) { return codec >= KV_INT4_RH; }
#ifdef KV_VNNI
constexpr bool has_byte_products = true;
#else
constexpr bool has_byte_products = false;
#endif
// Whether a panel of this form differs from what is stored.
constexpr bool unpacks(int form) {
  const int base = base_form(form);
  return base == KV_FP16 || (has_scale(base) && !(has_byte_products && base == KV_INT8));
}

template <int FORM, class T> KV_INLINE T step_of(T scale) { return base_form(FORM) == KV_N4_RH ? scale * 16.0f : scale; }
constexpr int NIBBLE_OFFSET = has_byte_products ? 8 : 0;
constexpr int offset_of_codes(int form) {
  const int base = base_form(form);
  return base == KV_INT8 || base == KV_N8_RH ? 128 : base == KV_INT4 || base == KV_N4_RH ? NIBBLE_OFFSET : 0;
}
template <int FORM, class T> KV_INLINE T base_of(T scale, T minimum) {
  constexpr float middle = base_form(FORM) == KV_N4_RH ? 7.5f : 0.0f;
  constexpr float offset = static_cast<float>(offset_of_codes(FORM)) * (base_form(FORM) == KV_N4_RH ? 16.0f : 1.0f);
  return offset + middle == 0.0f ? minimum : minimum + scale * (offset + middle);
}

// Elements of a 4-byte word: how many, and element J of each lane as float, without scale. `l`: the word of the
// low plane, where there is one. The general case is that of panels.
template <int FORM> struct Elements {
  static constexpr int count =
      !unpacks(FORM) ? Elements<base_form(FORM)>::count : has_byte_products && is_integer(FORM) ? 4 : 1;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w, VU l) {
    if constexpr (unpacks(FORM)) return as_float(w);
    else return Elements<base_form(FORM)>::template get<J>(w, l);
  }
};
template <> struct Elements<KV_FP32> {
  static constexpr int count = 1;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w, VU) { return as_float(w); }
};
template <> struct Elements<KV_BF16> {
  static constexpr int count = 2;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w, VU) {
    return as_float(J == 0 ? w << 16 : w & 0xffff0000u);
  }
};
template <> struct Elements<BF16_DOT> : Elements<KV_BF16> {};
template <> struct Elements<KV_FP16> {
  static constexpr int count = 2;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w, VU) {
    return half_to_float(J == 0 ? w & 0xffffu : w >> 16);
  }
};
template <> struct Elements<KV_INT8> {
  static constexpr int count = 4;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w, VU) {
    return to_float((VI)((w ^ 0x80808080u) << (24 - 8 * J)) >> 24);
  }
};
template <> struct Elements<KV_FP8> {  // e4m3: the exponent and 3 bits of mantissa moved into place
  static constexpr int count = 4;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w, VU) {
    const VU code = w << (24 - 8 * J);
    return (VF)((code & 0x80000000u) | ((code & 0x7f000000u) >> 4)) * 0x1p120f;
  }
};
template <> struct Elements<KV_INT4> {
  static constexpr int count = 8;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w, VU) {
    return to_float((VI)((w >> (8 * (J % 4) + 4 * (J / 4))) & 15u) - NIBBLE_OFFSET);
  }
};
template <> struct Elements<KV_N4_RH> : Elements<KV_INT4> {};
template <> struct Elements<KV_N8_RH> {
  static constexpr int count = 8;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w, VU l) {
    constexpr int shift = 8 * (J % 4) + 4 * (J / 4);
    return to_float((VI)(((w >> shift) & 15u) * 16u + ((l >> shift) & 15u)) - 128);
  }
};

KV_INLINE float fp8_to_float(uint8_t code) {
  const uint32_t bits = static_cast<uint32_t>(code & 0x80) << 24 | static_cast<uint32_t>(code & 0x7f) << 20;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x * 0x1p120f;
}
KV_INLINE int nibble_at(const uint8_t* p, int j) { return (p[j % 4] >> (4 * (j / 4))) & 15; }

// Element j of a word at p (and low, its low plane), one at a time (dims that do not fill a vector).
KV_INLINE float element_at(int form, const uint8_t* p, const uint8_t* low, int j) {
  if (is_panel(form) && unpacks(form)) {
    if (has_byte_products && is_integer(form)) return static_cast<float>(p[j] - offset_of_codes(form));
    float x; __builtin_memcpy(&x, p, 4); return x;
  }
  switch (base_form(form)) {
    case KV_FP32: { float x; __builtin_memcpy(&x, p, 4); return x; }
    case KV_BF16:
    case BF16_DOT: {
      uint16_t h; __builtin_memcpy(&h, p + 2 * j, 2);
      const uint32_t bits = static_cast<uint32_t>(h) << 16;
      float x; __builtin_memcpy(&x, &bits, 4); return x;
    }
    case KV_FP16: { uint16_t h; __builtin_memcpy(&h, p + 2 * j, 2); return half_to_float(h); }
    case KV_INT8: return static_cast<float>(static_cast<int>(p[j]) - 128);
    case KV_FP8: return fp8_to_float(p[j]);
    case KV_N8_RH: return static_cast<float>(nibble_at(p, j) * 16 + nibble_at(low, j) - 128);
    default: return static_cast<float>(nibble_at(p, j) - NIBBLE_OFFSET);
  }
}

KV_INLINE int elements_per_word(int codec) {
  return codec == KV_FP32 ? 1 : codec == KV_INT8 || codec == KV_FP8 ? 4 : has_base(codec) ? 8 : 2;
}
KV_INLINE int strip_values(int codec) { return has_base(codec) ? 2 : has_scale(codec) ? 1 : 0; }

// ---- rotation --------------------------------------------------------------------------------------------

// Hadamard blocks: the largest power of two that divides the dim, at most 128.
KV_INLINE int rotation_block(int dim) {
  int block = 8;
  while (block < 128 && dim % (2 * block) == 0) block *= 2;
  return block;
}

// Each lane becomes the one `SIZE` away.
template <int SIZE> KV_INLINE VF swapped(VF x) {
#if defined(__clang__)
  VF y;
  for (int i = 0; i < WIDTH; i++) y[i] = x[i ^ SIZE];
  return y;
#else
  return __builtin_shuffle(x, lane_index() ^ SIZE);
#endif
}
template <int SIZE> KV_INLINE VF butterfly(VF x, int block) {
  if constexpr (SIZE < WIDTH) {
    if (SIZE >= block) return x;
    const VF y = swapped<SIZE>(x);
    return select((lane_index() & SIZE) != 0, y - x, x + y);
  }
  return x;
}
// The steps of a rotation that stay inside a vector.
KV_INLINE VF butterflies(VF x, int block) {
  x = butterfly<1>(x, block);
  x = butterfly<2>(x, block);
  x = butterfly<4>(x, block);
  return butterfly<8>(x, block);
}

// x <- H x, orthonormal and its own inverse; the order of additions is that of kvtune/kernels/rotation.py.
static inline void rotate(float* x, int dim) {
  const int block = rotation_block(dim), whole = dim / WIDTH * WIDTH;
  for (int d = 0; d < whole; d += WIDTH) store(x + d, butterflies(load<VF>(x + d), block));
  for (int size = 1; size < WIDTH && size < block; size *= 2)  // dims that fill no vector
    for (int i = whole; i < dim; i += 2 * size)
      for (int j = i; j < i + size; j++) {
        const float a = x[j], b = x[j + size];
        x[j] = a + b;
        x[j + size] = a - b;
      }
  for (int size = WIDTH; size < block; size *= 2)
    for (int i = 0; i < dim; i += 2 * size)
      for (int j = i; j < i + size; j++) {
        const float a = x[j], b = x[j + size];
        x[j] = a + b;
        x[j + size] = a - b;
      }
  float factor = 1.0f;
  for (int size = block; size > 1; size /= 4) factor *= size == 2 ? 0.70710678118654752f : 0.5f;
  for (int d = 0; d < dim; d++) x[d] *= factor;
}

// The row of a block's low plane; null where it was dropped or is not to be read.
KV_INLINE uint8_t* low_plane(const KvSide& side, int64_t block) {
  if (side.low == nullptr) return nullptr;
  const int64_t row = side.low_row[block];
  return row < 0 || row >= side.num_low_rows ? nullptr : side.low + row * side.low_bytes;
}

KV_INLINE const KvArena* find_arena(const KvCache& cache, int64_t& block) {
  if (block < 0) return nullptr;
  if (block < cache.body.num_blocks) return &cache.body;
  block -= cache.body.num_blocks;
  return block < cache.first.num_blocks ? &cache.first : nullptr;
}
