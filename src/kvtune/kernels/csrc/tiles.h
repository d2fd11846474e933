// Scores and weighted values of one tile of keys, for one instruction set. Included in its namespace, after vec.h.
//
// Integer codes with VNNI: the query (and the softmax weights times V scale) become 16-bit fixed point, as
// two signed bytes, so a dot product is two integer products with the stored codes and a float correction.
// The rounding of the 16-bit side is 1/32512 of its largest magnitude, 128 times below int8's own.

struct TokenGroup {
  const uint8_t* k;
  const uint8_t* v;
  const uint16_t* k_strip;
  const uint16_t* v_strip;
  const uint8_t* next_k;  // the group a tile later: each line read here fetches its counterpart there
  const uint8_t* next_v;
  const uint8_t* k_low;  // null without a low plane; not looked ahead
  const uint8_t* v_low;
  int k_form;
  int v_form;
  Basis k_basis;
  Basis v_basis;
};

KV_INLINE const uint16_t* strip_at(const uint8_t* block, const KvSide& side, int B, int head, int offset) {
  const int64_t values = static_cast<int64_t>(head) * strip_values(side.codec) * B + offset;
  return reinterpret_cast<const uint16_t*>(block + side.strip_offset) + values;
}

// The 16 tokens from key position `key` of a sequence; false if the block table names no such block.
KV_INLINE bool find_group(const KvCache& cache, const int32_t* table, int head, int key, TokenGroup& group) {
  const int B = cache.block_size;
  int64_t id = table[key / B];
  const KvArena* arena = find_arena(cache, id);
  if (arena == nullptr) return false;
  const uint8_t* block = arena->data + id * arena->block_bytes;
  const int offset = key % B;
  const int64_t token = static_cast<int64_t>(head) * B + offset;
  const int ke = elements_per_word(arena->k.codec), ve = elements_per_word(arena->v.codec);
  group.k = block + arena->k.codes_offset + token / ke * arena->k.head_dim * 4;
  group.v = block + arena->v.codes_offset + token / ve * arena->v.head_dim * 4;
  group.k_strip = strip_at(block, arena->k, B, head, offset);
  group.v_strip = strip_at(block, arena->v, B, head, offset);
  const uint8_t *k_low = low_plane(arena->k, id), *v_low = low_plane(arena->v, id);
  group.k_low = k_low == nullptr ? nullptr : k_low + token / ke * arena->k.head_dim * 4;
  group.v_low = v_low == nullptr ? nullptr : v_low + token / ve * arena->v.head_dim * 4;
  group.k_form = form_of(arena->k.codec, k_low != nullptr);
  group.v_form = form_of(arena->v.codec, v_low != nullptr);
  group.k_basis = is_rotated(arena->k.codec) ? ROTATED : PLAIN;
  group.v_basis = is_rotated(arena->v.codec) ? ROTATED : PLAIN;
  return true;
}

// ---- scores ---------------------------------------------------------------------------------------------

// Unit = WIDTH of a group's 16 tokens. Raw dot products of NU units with R query rows.
template <int CODEC, int R, int NU>
KV_INLINE void dot_units(const uint8_t* const* unit, const uint8_t* const* unit_low, const uint8_t* const* next,
                         const float* q, int dim, VF (&acc)[NU][R]) {
  constexpr int E = Elements<CODEC>::count;
  for (int w = 0; w < dim / E; w++) {
    VU word[NU], low[NU] = {};
    for (int u = 0; u < NU; u++) {
      word[u] = load<VU>(unit[u] + w * 64);
      if constexpr (CODEC == KV_N8_RH) low[u] = load<VU>(unit_low[u] + w * 64);
      __builtin_prefetch(next[u] + w * 64);
    }
    const float* qw = q + w * E;
#define KV_STEP(J)                                                        \
  if constexpr (J < E) {                                                  \
    VF x[NU];                                                             \
    for (int u = 0; u < NU; u++) x[u] = Elements<CODEC>::template get<J>(word[u], low[u]); \
    for (int r = 0; r < R; r++) {                                         \
      const float b = qw[r * MAX_DIM + J];                            \
      for (int u = 0; u < NU; u++) acc[u][r] += x[u] * b;                 \
    }                                                                     \
  }
    KV_STEP(0) KV_STEP(1) KV_STEP(2) KV_STEP(3) KV_STEP(4) KV_STEP(5) KV_STEP(6) KV_STEP(7)
#undef KV_STEP
  }
}

#ifdef KV_VNNI
KV_INLINE VI word_of(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return VI{} + x;
}
KV_INLINE VI dot4(VI acc, VU codes, VI bytes) {
  return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)bytes);
}
// One instruction, the 4 bytes broadcast by the load itself: compilers do not fold this one.
KV_INLINE VI dot4(VI acc, VU codes, const int8_t* bytes) {
  typedef int32_t Word __attribute__((may_alias, aligned(1)));
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*reinterpret_cast<const Word*>(bytes)));
  return acc;
}
// Add the products of N code vectors with the same 4 bytes.
template <int N> KV_INLINE void dot4_all(VI* acc, const VU* codes, const int8_t* bytes) {
  if constexpr (N == 1) {
    acc[0] = dot4(acc[0], codes[0], bytes);
  } else {
    const VI word = word_of(bytes);
    for (int n = 0; n < N; n++) acc[n] = dot4(acc[n], codes[n], word);
  }
}

// The bytes of four elements: the first four of a word (part 0) or the last.
template <int CODEC> KV_INLINE VU code_bytes(VU word, VU low, int part) {
  if constexpr (CODEC == KV_INT8) return word;
  if constexpr (CODEC == KV_N8_RH)
    return part == 0 ? (word & 0x0f0f0f0fu) << 4 | (low & 0x0f0f0f0fu)
                     : (word & 0xf0f0f0f0u) | ((low >> 4) & 0x0f0f0f0fu);
  return (part == 0 ? word : word >> 4) & 0x0f0f0f0fu;
}
// The share of the codes' offset in the product, known beforehand.
template <int CODEC> KV_INLINE VI offset_of(int32_t sum) {
  constexpr uint32_t offset = offset_of_codes(CODEC);
  return VI{} + static_cast<int32_t>(-offset * static_cast<uint32_t>(sum));
}
// 256 x high + low. Exact: the sum fits 32 bits up to MAX_DIM even where its parts wrap.
KV_INLINE VF joined(VI high, VI low) { return to_float((VI)(((VU)high << 8) + (VU)low)); }

template <int CODEC, int R, int NU>
KV_INLINE void dot_units_vnni(const uint8_t* const* unit, const uint8_t* const* unit_low,
                              const uint8_t* const* next, const Query& query, int dim, VF (&out)[NU][R]) {
  VI high[R][NU], low[R][NU];
  for (int u = 0; u < NU; u++)
    for (int r = 0; r < R; r++) {
      high[r][u] = VI{};
      low[r][u] = offset_of<CODEC>(query.bytes_sum[r]);
    }
  constexpr int E = Elements<CODEC>::count;
  for (int w = 0; w < dim / E; w++) {
    VU word[NU], plane[NU] = {};
    for (int u = 0; u < NU; u++) {
      word[u] = load<VU>(unit[u] + w * 64);
      if constexpr (CODEC == KV_N8_RH) plane[u] = load<VU>(unit_low[u] + w * 64);
      __builtin_prefetch(next[u] + w * 64);
    }
    for (int part = 0; part < E / 4; part++) {
      VU codes[NU];
      for (int u = 0; u < NU; u++) codes[u] = code_bytes<CODEC>(word[u], plane[u], part);
      for (int r = 0; r < R; r++) {
        const int column = r * MAX_DIM + w * E + part * 4;
        dot4_all<NU>(high[r], codes, query.high + column);
        dot4_all<NU>(low[r], codes, query.low + column);
      }
    }
  }
  for (int u = 0; u < NU; u++)
    for (int r = 0; r < R; r++)
      out[u][r] = joined(high[r][u], low[r][u]) * query.step[r];
}
#endif

template <int CODEC, int R, int NU>
KV_INLINE void score_units(const TokenGroup* groups, int first, int B, int dim, float scale, const Query& query,
                           float* scores) {
  constexpr int PER_GROUP = GROUP / WIDTH;
  const uint8_t *unit[NU], *low[NU] = {}, *next[NU];
  for (int u = 0; u < NU; u++) {
    const int offset = (first + u) % PER_GROUP * WIDTH * 4;
    unit[u] = groups[(first + u) / PER_GROUP].k + offset;
    if constexpr (CODEC == KV_N8_RH) low[u] = groups[(first + u) / PER_GROUP].k_low + offset;
    next[u] = groups[(first + u) / PER_GROUP].next_k + offset;
  }
  VF acc[NU][R] = {};
#ifdef KV_VNNI
  if constexpr (is_integer(CODEC))
    dot_units_vnni<CODEC, R, NU>(unit, low, next, query, dim, acc);
  else
#endif
    dot_units<CODEC, R, NU>(unit, low, next, query.q, dim, acc);
  for (int u = 0; u < NU; u++) {
    VF step = splat(scale), base{};
    if constexpr (has_scale(CODEC)) {
      const uint16_t* strip = groups[(first + u) / PER_GROUP].k_strip + (first + u) % PER_GROUP * WIDTH;
      const VF stored = load_halves(strip);
      step = step_of<CODEC>(stored) * scale;
      if constexpr (has_base(CODEC)) base = base_of<CODEC>(stored, load_halves(strip + B)) * scale;
    }
    for (int r = 0; r < R; r++) {
      VF score = acc[u][r] * step;
      if constexpr (has_base(CODEC)) score += base * query.sum[r];
      store(scores + r * TILE + (first + u) * WIDTH, score + query.centre[r]);
    }
  }
}

constexpr int units_at_once(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

// Scores of `count` groups of one form and basis into rows of TILE (columns from the tile's group `at`).
template <int CODEC, int R>
static void score_groups(const TokenGroup* groups, int at, int count, int B, int dim, float scale,
                         const Query& query, float* scores) {
  constexpr int PER_GROUP = GROUP / WIDTH, NU = units_at_once(R);
  int u = at * PER_GROUP;
  const int stop = (at + count) * PER_GROUP;
  for (; u + NU <= stop; u += NU) score_units<CODEC, R, NU>(groups, u, B, dim, scale, query, scores);
  for (; u < stop; u++) score_units<CODEC, R, 1>(groups, u, B, dim, scale, query, scores);
}

// ---- values ---------------------------------------------------------------------------------------------

// acc[r][dims from d0] += weights x values, NV vectors of dims at a time.
template <int CODEC, int R, int NV>
KV_INLINE void add_values(const TokenGroup* groups, int at, int count, int d0, int dim, Work& work, float* out) {
  constexpr int E = Elements<CODEC>::count;
  VF acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) acc[r][n] = load<VF>(out + r * MAX_DIM + d0 + n * WIDTH);
  for (int g = at; g < at + count; g++) {
    const uint8_t *base = groups[g].v + d0 * 4, *next = groups[g].next_v + d0 * 4;
    for (int row = 0; row < GROUP / E; row++, base += dim * 4, next += dim * 4) {
      VU word[NV], low[NV] = {};
      for (int n = 0; n < NV; n++) {
        word[n] = load<VU>(base + n * WIDTH * 4);
        if constexpr (CODEC == KV_N8_RH) low[n] = load<VU>(groups[g].v_low + (row * dim + d0 + n * WIDTH) * 4);
        __builtin_prefetch(next + n * WIDTH * 4);
      }
      const float* weight = work.weights + g * GROUP + row * E;
#define KV_STEP(J)                                                        \
  if constexpr (J < E) {                                                  \
    VF x[NV];                                                             \
    for (int n = 0; n < NV; n++) x[n] = Elements<CODEC>::template get<J>(word[n], low[n]); \
    for (int r = 0; r < R; r++) {                                         \
      const float b = weight[r * TILE + J];                           \
      for (int n = 0; n < NV; n++) acc[r][n] += x[n] * b;                 \
    }                                                                     \
  }
      KV_STEP(0) KV_STEP(1) KV_STEP(2) KV_STEP(3) KV_STEP(4) KV_STEP(5) KV_STEP(6) KV_STEP(7)
#undef KV_STEP
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) store(out + r * MAX_DIM + d0 + n * WIDTH, acc[r][n]);
}

#ifdef KV_VNNI
// The same with weights as two signed bytes: `step[r]` is the value of one unit of row r's weights.
template <int CODEC, int R, int NV>
KV_INLINE void add_values_vnni(const TokenGroup* groups, int at, int count, int d0, int dim, const Work& work,
                               const int32_t* sums, const float* step, float* out) {
  constexpr int E = Elements<CODEC>::count;
  VI high[R][NV], low[R][NV];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) {
      high[r][n] = VI{};
      low[r][n] = offset_of<CODEC>(sums[r]);
    }
  for (int g = at; g < at + count; g++) {
    const uint8_t *base = groups[g].v + d0 * 4, *next = groups[g].next_v + d0 * 4;
    for (int row = 0; row < GROUP / E; row++, base += dim * 4, next += dim * 4) {
      VU word[NV], plane[NV] = {};
      for (int n = 0; n < NV; n++) {
        word[n] = load<VU>(base + n * WIDTH * 4);
        if constexpr (CODEC == KV_N8_RH) plane[n] = load<VU>(groups[g].v_low + (row * dim + d0 + n * WIDTH) * 4);
        __builtin_prefetch(next + n * WIDTH * 4);
      }
      for (int part = 0; part < E / 4; part++) {
        const int column = g * GROUP + row * E + part * 4;
        VU codes[NV];
        for (int n = 0; n < NV; n++) codes[n] = code_bytes<CODEC>(word[n], plane[n], part);
        for (int r = 0; r < R; r++) {
          dot4_all<NV>(high[r], codes, work.w_high + r * TILE + column);
          dot4_all<NV>(low[r], codes, work.w_low + r * TILE + column);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) {
      float* p = out + r * MAX_DIM + d0 + n * WIDTH;
      store(p, load<VF>(p) + joined(high[r][n], low[r][n]) * step[r]);
    }
}

// work.weights of `count` groups -> bytes and their sum; step[r] = 0 where all weights are 0, NaN where one
// is not finite.
KV_INLINE void quantise_weights(int rows, int at, int count, Work& work, int32_t* sums, float* step) {
  for (int r = 0; r < rows; r++) {
    const float* w = work.weights + r * TILE;
    VI largest{};  // weights are not negative: their bits order as integers, NaN above all
    for (int c = at * GROUP; c < (at + count) * GROUP; c += WIDTH) {
      const VI x = load<VI>(w + c) & 0x7fffffff;
      largest = (x & (x > largest)) | (largest & (x <= largest));
    }
    const int32_t bits = _mm512_reduce_max_epi32((__m512i)largest);
    float top;
    __builtin_memcpy(&top, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float inverse = finite && top > 0.0f ? 32512.0f / top : 0.0f;
    step[r] = finite ? top * (1.0f / 32512.0f) : __builtin_nanf("");
    VI sum{};
    for (int c = at * GROUP; c < (at + count) * GROUP; c += WIDTH) {
      const VI x = (VI)_mm512_cvtps_epi32((__m512)(load<VF>(w + c) * inverse));
      const VI high = (x + 128) >> 8;
      sum += x;
      _mm_storeu_si128((__m128i*)(work.w_high + r * TILE + c), _mm512_cvtepi32_epi8((__m512i)high));
      _mm_storeu_si128((__m128i*)(work.w_low + r * TILE + c), _mm512_cvtepi32_epi8((__m512i)x));
    }
    sums[r] = horizontal_sum(sum);
  }
}
#endif

// Multiply the weights by V's steps; sum weight x base, which every dim gets, into `shift_lanes`.
template <int CODEC, int R>
KV_INLINE void scale_weights(const TokenGroup* groups, int at, int count, int B, Work& work, float* shift_lanes) {
  VF shift[R] = {};
  for (int g = at; g < at + count; g++)
    for (int c = 0; c < GROUP; c += WIDTH) {
      const VF stored = load_halves(groups[g].v_strip + c), scale = step_of<CODEC>(stored);
      VF base{};
      if constexpr (has_base(CODEC)) base = base_of<CODEC>(stored, load_halves(groups[g].v_strip + B + c));
      for (int r = 0; r < R; r++) {
        float* p = work.weights + r * TILE + g * GROUP + c;
        const VF weight = load<VF>(p);
        // Strips past the context hold anything: a weight of 0 stays 0.
        store(p, select(weight == 0.0f, VF{}, weight * scale));
        if constexpr (has_base(CODEC)) shift[r] += select(weight == 0.0f, VF{}, weight * base);
      }
    }
  if constexpr (has_base(CODEC))
    for (int r = 0; r < R; r++) {
      float* lanes = shift_lanes + r * GROUP;
      store(lanes, load<VF>(lanes) + shift[r]);
    }
}

template <int CODEC, int R>
static void value_groups(const TokenGroup* groups, int at, int count, int B, int dim, Work& work, float* shift_lanes,
                         float* out) {
  constexpr int E = Elements<CODEC>::count, NV = units_at_once(R);
  if constexpr (has_scale(CODEC)) scale_weights<CODEC, R>(groups, at, count, B, work, shift_lanes);
  int d = 0;
#ifdef KV_VNNI
  if constexpr (is_integer(CODEC)) {
    int32_t sums[R];
    float step[R];
    quantise_weights(R, at, count, work, sums, step);
    for (; d + NV * WIDTH <= dim; d += NV * WIDTH)
      add_values_vnni<CODEC, R, NV>(groups, at, count, d, dim, work, sums, step, out);
    for (; d + WIDTH <= dim; d += WIDTH)
      add_values_vnni<CODEC, R, 1>(groups, at, count, d, dim, work, sums, step, out);
  }
#endif
  for (; d + NV * WIDTH <= dim; d += NV * WIDTH) add_values<CODEC, R, NV>(groups, at, count, d, dim, work, out);
  for (; d + WIDTH <= dim; d += WIDTH) add_values<CODEC, R, 1>(groups, at, count, d, dim, work, out);
  for (; d < dim; d++)  // head dims that are no multiple of the vector width
    for (int r = 0; r < R; r++) {
      float acc = out[r * MAX_DIM + d];
      for (int c = at * GROUP; c < (at + count) * GROUP; c++) {
        const int t = c % GROUP, word = (t / E * dim + d) * 4;
        const TokenGroup& group = groups[c / GROUP];
        const uint8_t* low = CODEC == KV_N8_RH ? group.v_low + word : nullptr;
        acc += work.weights[r * TILE + c] * element_at(CODEC, group.v + word, low, t % E);
      }
      out[r * MAX_DIM + d] = acc;
    }
}

// ---- choosing the instance by codec and row count ---------------------------------------------------------

using GroupKernel = void (*)(const TokenGroup*, int at, int count, int B, int dim, float scale, const Query&, float*);
using ValueKernel = void (*)(const TokenGroup*, int at, int count, int B, int dim, Work&, float*, float*);

#define KV_ROWS(NAME, C) \
  { NAME<C, 1>, NAME<C, 2>, NAME<C, 3>, NAME<C, 4>, NAME<C, 5>, NAME<C, 6>, NAME<C, 7>, NAME<C, 8> }
#define KV_FORMS(NAME)                                                                                      \
  { KV_ROWS(NAME, KV_FP32), KV_ROWS(NAME, KV_BF16), KV_ROWS(NAME, KV_FP16), KV_ROWS(NAME, KV_INT8),          \
    KV_ROWS(NAME, KV_INT4), KV_ROWS(NAME, KV_FP8), KV_ROWS(NAME, KV_N8_RH), KV_ROWS(NAME, KV_N4_RH) }
static const GroupKernel score_kernels[NUM_FORMS][MAX_ROWS] = KV_FORMS(score_groups);
static const ValueKernel value_kernels[NUM_FORMS][MAX_ROWS] = KV_FORMS(value_groups);
#undef KV_ROWS
#undef KV_FORMS
