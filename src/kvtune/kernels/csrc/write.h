// Encode and store, decode and gather, for one instruction set. Included inside its namespace, after vec.h,
// in a file compiled without contraction: the bytes equal those of kvtune/kernels/quantise.py.

KV_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// Round to nearest even. Finite values beyond 65504 saturate (`saturate_fp16` before), NaN is 0x7e00.
KV_INLINE uint16_t to_fp16(float x) {
  uint32_t u = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return 0x7e00;
  if (u >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00);  // infinity
  if (u < 0x38800000u) return static_cast<uint16_t>(sign | (bits_of(float_of(u) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((u - 0x38000000u + 0xfffu + ((u >> 13) & 1)) >> 13));
}
KV_INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
KV_INLINE float saturate_fp16(float x) { return is_finite(x) ? clamp(x, -65504.0f, 65504.0f) : x; }
// Nearest even for |x| < 2^22.
KV_INLINE float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// To e4m3, nearest even, for |x| <= 448.
KV_INLINE uint8_t to_fp8(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu;
  const uint8_t sign = static_cast<uint8_t>((u >> 24) & 0x80u);
  if (magnitude < 0x3c800000u)  // below 2^-6: steps of 2^-9
    return static_cast<uint8_t>(sign | (bits_of(float_of(magnitude) + 16384.0f) - 0x46800000u));
  return static_cast<uint8_t>(sign | ((magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1)) >> 20));
}

// One vector's strip, its codes (those of float codecs little-endian), and for nested codes the nibbles below them.
struct Quantised {
  uint16_t scale;
  uint16_t minimum;
  alignas(64) uint8_t codes[MAX_DIM * 4];
  uint8_t low[MAX_DIM];
};

KV_INLINE bool all_finite(const float* x, int dim) {
  uint32_t worst = 0;
  for (int d = 0; d < dim; d++) {
    const uint32_t magnitude = bits_of(x[d]) & 0x7fffffffu;
    worst = magnitude > worst ? magnitude : worst;
  }
  return worst < 0x7f800000u;
}

KV_INLINE float divisor_of(uint16_t scale) {
  const float x = half_to_float(scale);
  return x > 0.0f ? x : 1.0f;
}

static void quantise_int8(const float* x, int dim, Quantised& out) {
  if (!all_finite(x, dim)) {
    out.scale = 0x7e00;
    for (int d = 0; d < dim; d++) out.codes[d] = 128;
    return;
  }
  float top = 0.0f;
  for (int d = 0; d < dim; d++) top = max_of(top, __builtin_fabsf(x[d]));
  out.scale = to_fp16(saturate_fp16(top / 127.0f));
  const float divisor = divisor_of(out.scale);
  for (int d = 0; d < dim; d++)
    out.codes[d] = static_cast<uint8_t>(static_cast<int>(round_even(clamp(x[d] / divisor, -127.0f, 127.0f))) + 128);
}

static void quantise_fp8(const float* x, int dim, Quantised& out) {
  const bool finite = all_finite(x, dim);
  float top = 0.0f;
  for (int d = 0; d < dim && finite; d++) top = max_of(top, __builtin_fabsf(x[d]));
  out.scale = finite ? to_fp16(saturate_fp16(top / 448.0f)) : 0x7e00;
  const float divisor = divisor_of(out.scale);
  for (int d = 0; d < dim; d++) out.codes[d] = finite ? to_fp8(clamp(x[d] / divisor, -448.0f, 448.0f)) : 0;
}

// Codes 0..levels.
static void quantise_range(const float* x, int dim, float levels, Quantised& out) {
  if (!all_finite(x, dim)) {
    out.scale = out.minimum = 0x7e00;
    for (int d = 0; d < dim; d++) out.codes[d] = 0;
    return;
  }
  float low = x[0], high = x[0];
  for (int d = 1; d < dim; d++) {
    low = x[d] < low ? x[d] : low;
    high = x[d] > high ? x[d] : high;
  }
  const float step = (high - low) / levels;  // may overflow to infinity: saturates like any other
  out.scale = to_fp16(step > 65504.0f ? 65504.0f : step);
  out.minimum = to_fp16(saturate_fp16(low));
  if (out.minimum == 0x8000) out.minimum = 0;  // which zero a minimum picks depends on order: keep +0
  const float base = half_to_float(out.minimum), divisor = divisor_of(out.scale);
  for (int d = 0; d < dim; d++)
    out.codes[d] = static_cast<uint8_t>(static_cast<int>(round_even(clamp((x[d] - base) / divisor, 0.0f, levels))));
}

// A vector as a rotated codec sees it: without its centre, within what 128 additions cannot overflow, rotated.
static void to_stored_basis(const float* x, const float* centre, int dim, float* out) {
  for (int d = 0; d < dim; d++) {
    const float y = centre == nullptr ? x[d] : x[d] - centre[d];
    out[d] = is_finite(y) ? clamp(y, -0x1p100f, 0x1p100f) : y;
  }
  rotate(out, dim);
}

// The codes of a float codec.
static void cast(int codec, const float* x, int dim, uint8_t* codes) {
  if (codec == KV_FP32)
    for (int d = 0; d < dim; d++) {
      const uint32_t code = x[d] != x[d] ? 0x7fc00000u : bits_of(x[d]);
      __builtin_memcpy(codes + d * 4, &code, 4);
    }
  for (int d = 0; d < dim && codec != KV_FP32; d++) {
    const uint16_t code = codec == KV_BF16 ? to_bf16(x[d]) : to_fp16(saturate_fp16(x[d]));
    __builtin_memcpy(codes + d * 2, &code, 2);
  }
}

static void quantise(const KvSide& side, int head, const float* x, Quantised& out) {
  const int dim = side.head_dim;
  if (!has_scale(side.codec)) return cast(side.codec, x, dim, out.codes);
  float rotated[MAX_DIM];
  if (is_rotated(side.codec)) {
    to_stored_basis(x, side.centre == nullptr ? nullptr : side.centre + static_cast<int64_t>(head) * dim, dim, rotated);
    x = rotated;
  }
  if (side.codec == KV_INT8) quantise_int8(x, dim, out);
  if (side.codec == KV_FP8) quantise_fp8(x, dim, out);
  if (side.codec == KV_INT4 || side.codec == KV_INT4_RH) quantise_range(x, dim, 15.0f, out);
  if (side.codec != KV_N8_RH && side.codec != KV_N4_RH) return;
  quantise_range(x, dim, 255.0f, out);
  for (int d = 0; d < dim; d++) {
    out.low[d] = out.codes[d] & 15;
    out.codes[d] >>= 4;
  }
}

// `at`: word 0 of the token; consecutive words of K are 64 bytes apart.
static void store_k(int codec, const uint8_t* codes, int dim, uint8_t* at) {
  const int E = elements_per_word(codec);
  for (int w = 0; w < dim / E; w++, at += 64) {
    if (E < 8) {
      __builtin_memcpy(at, codes + w * 4, 4);
    } else {
      uint32_t low, high;
      __builtin_memcpy(&low, codes + w * 8, 4);
      __builtin_memcpy(&high, codes + w * 8 + 4, 4);
      low |= high << 4;
      __builtin_memcpy(at, &low, 4);
    }
  }
}

// SIZE bytes each, 4 bytes apart.
template <int SIZE> KV_INLINE void spread(const uint8_t* codes, int dim, uint8_t* at) {
  for (int d = 0; d < dim; d++) __builtin_memcpy(at + d * 4, codes + d * SIZE, SIZE);
}

// `at`: the word row of the token's E neighbours; consecutive dims are 4 bytes apart; `j`: token in the word.
static void store_v(int codec, const uint8_t* codes, int dim, uint8_t* at, int j) {
  const int E = elements_per_word(codec);
  if (E == 1) return spread<4>(codes, dim, at);
  if (E == 2) return spread<2>(codes, dim, at + j * 2);
  if (E == 4) return spread<1>(codes, dim, at + j);
  const int shift = 8 * (j % 4) + 4 * (j / 4);
  for (int d = 0; d < dim; d++) {
    uint32_t word;
    __builtin_memcpy(&word, at + d * 4, 4);
    word = (word & ~(15u << shift)) | static_cast<uint32_t>(codes[d]) << shift;
    __builtin_memcpy(at + d * 4, &word, 4);
  }
}

static int write_head(const KvWrite& a, int head, int side_index) {
  const KvCache& cache = *a.cache;
  const int B = cache.block_size;
  const KvRows& source = side_index == 0 ? a.k : a.v;
  Quantised z;
  alignas(64) float x[MAX_DIM];
  for (int64_t n = 0; n < a.num_tokens; n++) {
    if (a.slots[n] < 0) continue;
    int64_t block = a.slots[n] / B;
    const int offset = static_cast<int>(a.slots[n] % B);
    const KvArena* arena = find_arena(cache, block);
    if (arena == nullptr) return KV_BAD_BLOCK;
    const KvSide& side = side_index == 0 ? arena->k : arena->v;
    const int dim = side.head_dim, E = elements_per_word(side.codec);
    read_row(source, n, head, dim, x);
    quantise(side, head, x, z);
    uint8_t* base = arena->data + block * arena->block_bytes;
    uint8_t* codes = base + side.codes_offset;
    const int64_t token = static_cast<int64_t>(head) * B + offset;
    const int64_t at = side_index == 0 ? (token / GROUP * GROUP) / E * dim * 4 + token % GROUP * 4 : token / E * dim * 4;
    uint8_t* low = low_plane(side, block);
    if (side_index == 0) {
      store_k(side.codec, z.codes, dim, codes + at);
      if (low != nullptr) store_k(side.codec, z.low, dim, low + at);
    } else {
      store_v(side.codec, z.codes, dim, codes + at, static_cast<int>(token % E));
      if (low != nullptr) store_v(side.codec, z.low, dim, low + at, static_cast<int>(token % E));
    }
    uint8_t* strip = base + side.strip_offset;
    const int values = strip_values(side.codec);
    const int64_t first = static_cast<int64_t>(head) * values * B + offset;
    if (values > 0) __builtin_memcpy(strip + first * 2, &z.scale, 2);
    if (values > 1) __builtin_memcpy(strip + (first + B) * 2, &z.minimum, 2);
  }
  return KV_OK;
}

// ---- gather: decoded values of one block, [token, head, dim] ------------------------------------------------

// The code at `word` as gather counts it: 0..255 for nested codes, the middle of what the low plane would say
// where it is not there; else what the element says.
KV_INLINE float code_at(int codec, const uint8_t* word, const uint8_t* low, int j) {
  if (codec != KV_N8_RH && codec != KV_N4_RH) return element_at(form_of(codec, false), word, nullptr, j);
  const float below = low == nullptr ? 7.5f : static_cast<float>(nibble_at(low, j));
  return static_cast<float>(nibble_at(word, j)) * 16.0f + below;
}

KV_INLINE float decoded(int codec, float code, const uint8_t* strip, int64_t at, int B) {
  if (!has_scale(codec)) return code;
  uint16_t scale, minimum;
  __builtin_memcpy(&scale, strip + at * 2, 2);
  if (!has_base(codec)) return code * half_to_float(scale);
  __builtin_memcpy(&minimum, strip + (at + B) * 2, 2);
  return code * half_to_float(scale) + half_to_float(minimum);
}

static void gather_side(const KvGather& a, const KvArena& arena, int64_t block, int64_t first, int count, bool is_k) {
  const KvCache& cache = *a.cache;
  const KvSide& side = is_k ? arena.k : arena.v;
  const int B = cache.block_size, h = cache.num_kv_heads, dim = side.head_dim;
  const int E = elements_per_word(side.codec);
  const uint8_t* base = arena.data + block * arena.block_bytes;
  const uint8_t* low = low_plane(side, block);
  for (int t = 0; t < count; t++)
    for (int head = 0; head < h; head++) {
      float* out = (is_k ? a.k : a.v) + ((first + t) * h + head) * dim;
      const int64_t token = static_cast<int64_t>(head) * B + t;
      const int64_t strip = static_cast<int64_t>(head) * strip_values(side.codec) * B + t;
      const int64_t at = is_k ? (token / GROUP * GROUP) / E * dim * 4 + token % GROUP * 4 : token / E * dim * 4;
      for (int d = 0; d < dim; d++) {
        const int64_t word = at + (is_k ? d / E * 64 : d * 4);
        const int j = is_k ? d % E : static_cast<int>(token % E);
        const float code = code_at(side.codec, base + side.codes_offset + word, low == nullptr ? low : low + word, j);
        out[d] = decoded(side.codec, code, base + side.strip_offset, strip, B);
      }
      if (is_rotated(side.codec)) rotate(out, dim);
      if (is_rotated(side.codec) && side.centre != nullptr)
        for (int d = 0; d < dim; d++) out[d] += side.centre[static_cast<int64_t>(head) * dim + d];
    }
}

static int gather_block(const KvGather& a, int64_t index) {
  const int64_t first = index * a.cache->block_size;
  const int64_t left = a.num_tokens - first;
  const int count = static_cast<int>(left < a.cache->block_size ? left : a.cache->block_size);
  int64_t block = a.block_ids[index];
  const KvArena* arena = find_arena(*a.cache, block);
  if (block < 0) {
    const int64_t h = a.cache->num_kv_heads;
    const int64_t Dk = a.cache->body.k.head_dim, Dv = a.cache->body.v.head_dim;
    __builtin_memset(a.k + first * h * Dk, 0, static_cast<std::size_t>(count * h * Dk) * 4);
    __builtin_memset(a.v + first * h * Dv, 0, static_cast<std::size_t>(count * h * Dv) * 4);
    return KV_OK;
  }
  if (arena == nullptr) return KV_BAD_BLOCK;
  gather_side(a, *arena, block, first, count, true);
  gather_side(a, *arena, block, first, count, false);
  return KV_OK;
}
