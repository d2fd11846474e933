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

// fp16 in the low 16 bits of each lane -> float. Exact, subnormals included; inf and NaN stay what they are.
KV_INLINE VF half_to_float(VU h) {
  const VU magnitude = (h & 0x7fffu) << 13;
  const VU sign = (h & 0x8000u) << 16;
  const VU special = (VU)(magnitude >= 0x0f800000u) & 0x7f800000u;
  const VF value = (VF)magnitude * 0x1p112f;
  return (VF)((VU)value | special | sign);
}

KV_INLINE VF load_halves(const uint16_t* p) { return half_to_float(__builtin_convertvector(load<VH>(p), VU)); }

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

// e^x for x <= 0 (and small positive x); 0 below -87, NaN for NaN. Relative error below 2e-7 (Cephes).
KV_INLINE VF exp_of(VF x) {
  const VF shifted = x * 1.44269504f + 12582912.0f;
  const VF n = shifted - 12582912.0f;
  VF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VI exponent = ((VI)shifted - 0x4b400000) << 23;
  const VF y = (VF)((VI)p + exponent);
  // A NaN survives the polynomial, but its bits may not survive the exponent: select it back.
  return select(x < -87.0f, VF{}, select(x == x, y, x));
}

KV_INLINE float exp_of(float x) { return exp_of(splat(x))[0]; }

// Elements of a 4-byte word: how many, and element J of each lane as float. int8 and int4 without scale.
template <int CODEC> struct Elements;
template <> struct Elements<KV_FP32> {
  static constexpr int count = 1;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w) { return as_float(w); }
};
template <> struct Elements<KV_BF16> {
  static constexpr int count = 2;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w) {
    return as_float(J == 0 ? w << 16 : w & 0xffff0000u);
  }
};
template <> struct Elements<KV_FP16> {
  static constexpr int count = 2;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w) {
    return half_to_float(J == 0 ? w & 0xffffu : w >> 16);
  }
};
template <> struct Elements<KV_INT8> {
  static constexpr int count = 4;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w) {
    return to_float((VI)((w ^ 0x80808080u) << (24 - 8 * J)) >> 24);
  }
};
template <> struct Elements<KV_INT4> {
  static constexpr int count = 8;
  template <int J> static inline __attribute__((always_inline)) VF get(VU w) {
    return to_float((VI)((w >> (8 * (J % 4) + 4 * (J / 4))) & 15u));
  }
};

// Element j of a word at p, one at a time (dims that do not fill a vector, gather).
KV_INLINE float element_at(int codec, const uint8_t* p, int j) {
  switch (codec) {
    case KV_FP32: { float x; __builtin_memcpy(&x, p, 4); return x; }
    case KV_BF16: {
      uint16_t h; __builtin_memcpy(&h, p + 2 * j, 2);
      const uint32_t bits = static_cast<uint32_t>(h) << 16;
      float x; __builtin_memcpy(&x, &bits, 4); return x;
    }
    case KV_FP16: { uint16_t h; __builtin_memcpy(&h, p + 2 * j, 2); return half_to_float(h); }
    case KV_INT8: return static_cast<float>(static_cast<int>(p[j]) - 128);
    default: return static_cast<float>((p[j % 4] >> (4 * (j / 4))) & 15);
  }
}

KV_INLINE int elements_per_word(int codec) {
  return codec == KV_FP32 ? 1 : codec == KV_INT8 ? 4 : codec == KV_INT4 ? 8 : 2;
}
KV_INLINE int strip_values(int codec) { return codec == KV_INT8 ? 1 : codec == KV_INT4 ? 2 : 0; }
KV_INLINE bool is_integer(int codec) { return codec >= KV_INT8; }

KV_INLINE const KvArena* find_arena(const KvCache& cache, int64_t& block) {
  if (block < 0) return nullptr;
  if (block < cache.body.num_blocks) return &cache.body;
  block -= cache.body.num_blocks;
  return block < cache.first.num_blocks ? &cache.first : nullptr;
}
