// Paged attention for one instruction set. Included inside its namespace, after vec.h.
//
// Loop nest: keys in tiles of 64 at fixed absolute positions; per tile the scores of up to 8 query rows that
// share a KV head (so K and V are read once for all of them), an online softmax step, then the values.
// A row's sums run in one fixed order whatever rows are computed beside it.
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
  int k_codec;
  int v_codec;
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
  group.k_codec = arena->k.codec;
  group.v_codec = arena->v.codec;
  return true;
}

// ---- scores ---------------------------------------------------------------------------------------------

// Unit = WIDTH of a group's 16 tokens. Raw dot products of NU units with R query rows.
template <int CODEC, int R, int NU>
KV_INLINE void dot_units(const uint8_t* const* unit, const uint8_t* const* next, const float* q, int dim,
                         VF (&acc)[NU][R]) {
  constexpr int E = Elements<CODEC>::count;
  for (int w = 0; w < dim / E; w++) {
    VU word[NU];
    for (int u = 0; u < NU; u++) {
      word[u] = load<VU>(unit[u] + w * 64);
      __builtin_prefetch(next[u] + w * 64);
    }
    const float* qw = q + w * E;
#define KV_STEP(J)                                                        \
  if constexpr (J < E) {                                                  \
    VF x[NU];                                                             \
    for (int u = 0; u < NU; u++) x[u] = Elements<CODEC>::template get<J>(word[u]); \
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

// int8 codes carry an offset of 128: its share of the product, known beforehand.
template <int CODEC> KV_INLINE VI offset_of(int32_t sum) {
  return VI{} + (CODEC == KV_INT8 ? static_cast<int32_t>(-128u * static_cast<uint32_t>(sum)) : 0);
}
// 256 x high + low. Exact: the sum fits 32 bits up to MAX_DIM even where its parts wrap.
KV_INLINE VF joined(VI high, VI low) { return to_float((VI)(((VU)high << 8) + (VU)low)); }

template <int CODEC, int R, int NU>
KV_INLINE void dot_units_vnni(const uint8_t* const* unit, const uint8_t* const* next, const Work& work, int dim,
                              VF (&out)[NU][R]) {
  VI high[R][NU], low[R][NU];
  for (int u = 0; u < NU; u++)
    for (int r = 0; r < R; r++) {
      high[r][u] = VI{};
      low[r][u] = offset_of<CODEC>(work.q_bytes_sum[r]);
    }
  constexpr int E = Elements<CODEC>::count;
  for (int w = 0; w < dim / E; w++) {
    VU word[NU];
    for (int u = 0; u < NU; u++) {
      word[u] = load<VU>(unit[u] + w * 64);
      __builtin_prefetch(next[u] + w * 64);
    }
    for (int part = 0; part < E / 4; part++) {
      VU codes[NU];
      for (int u = 0; u < NU; u++)
        codes[u] = CODEC == KV_INT8 ? word[u] : (part == 0 ? word[u] : word[u] >> 4) & 0x0f0f0f0fu;
      for (int r = 0; r < R; r++) {
        const int column = r * MAX_DIM + w * E + part * 4;
        dot4_all<NU>(high[r], codes, work.q_high + column);
        dot4_all<NU>(low[r], codes, work.q_low + column);
      }
    }
  }
  for (int u = 0; u < NU; u++)
    for (int r = 0; r < R; r++)
      out[u][r] = joined(high[r][u], low[r][u]) * work.q_step[r];
}
#endif

template <int CODEC, int R, int NU>
KV_INLINE void score_units(const TokenGroup* groups, int first, int B, int dim, float scale, Work& work) {
  constexpr int PER_GROUP = GROUP / WIDTH;
  const uint8_t *unit[NU], *next[NU];
  for (int u = 0; u < NU; u++) {
    const int offset = (first + u) % PER_GROUP * WIDTH * 4;
    unit[u] = groups[(first + u) / PER_GROUP].k + offset;
    next[u] = groups[(first + u) / PER_GROUP].next_k + offset;
  }
  VF acc[NU][R] = {};
#ifdef KV_VNNI
  if constexpr (CODEC == KV_INT8 || CODEC == KV_INT4)
    dot_units_vnni<CODEC, R, NU>(unit, next, work, dim, acc);
  else
#endif
    dot_units<CODEC, R, NU>(unit, next, work.q, dim, acc);
  for (int u = 0; u < NU; u++) {
    VF step = splat(scale), minimum{};
    if constexpr (CODEC == KV_INT8 || CODEC == KV_INT4) {
      const uint16_t* strip = groups[(first + u) / PER_GROUP].k_strip + (first + u) % PER_GROUP * WIDTH;
      step = load_halves(strip) * scale;
      if constexpr (CODEC == KV_INT4) minimum = load_halves(strip + B) * scale;
    }
    for (int r = 0; r < R; r++) {
      VF score = acc[u][r] * step;
      if constexpr (CODEC == KV_INT4) score += minimum * work.q_sum[r];
      store(work.scores + r * TILE + (first + u) * WIDTH, score);
    }
  }
}

constexpr int units_at_once(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

// Scores of `count` groups of one K codec into work.scores (columns from the tile's group `at`).
template <int CODEC, int R>
static void score_groups(const TokenGroup* groups, int at, int count, int B, int dim, float scale, Work& work) {
  constexpr int PER_GROUP = GROUP / WIDTH, NU = units_at_once(R);
  int u = at * PER_GROUP;
  const int stop = (at + count) * PER_GROUP;
  for (; u + NU <= stop; u += NU) score_units<CODEC, R, NU>(groups, u, B, dim, scale, work);
  for (; u < stop; u++) score_units<CODEC, R, 1>(groups, u, B, dim, scale, work);
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
      VU word[NV];
      for (int n = 0; n < NV; n++) {
        word[n] = load<VU>(base + n * WIDTH * 4);
        __builtin_prefetch(next + n * WIDTH * 4);
      }
      const float* weight = work.weights + g * GROUP + row * E;
#define KV_STEP(J)                                                        \
  if constexpr (J < E) {                                                  \
    VF x[NV];                                                             \
    for (int n = 0; n < NV; n++) x[n] = Elements<CODEC>::template get<J>(word[n]); \
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
      VU word[NV];
      for (int n = 0; n < NV; n++) {
        word[n] = load<VU>(base + n * WIDTH * 4);
        __builtin_prefetch(next + n * WIDTH * 4);
      }
      for (int part = 0; part < E / 4; part++) {
        const int column = g * GROUP + row * E + part * 4;
        VU codes[NV];
        for (int n = 0; n < NV; n++)
          codes[n] = CODEC == KV_INT8 ? word[n] : (part == 0 ? word[n] : word[n] >> 4) & 0x0f0f0f0fu;
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

// Multiply the weights by V's scales; int4 also sums weight x minimum, which every dim gets.
template <int CODEC, int R>
KV_INLINE void scale_weights(const TokenGroup* groups, int at, int count, int B, Work& work) {
  VF shift[R] = {};
  for (int g = at; g < at + count; g++)
    for (int c = 0; c < GROUP; c += WIDTH) {
      const VF scale = load_halves(groups[g].v_strip + c);
      VF minimum{};
      if constexpr (CODEC == KV_INT4) minimum = load_halves(groups[g].v_strip + B + c);
      for (int r = 0; r < R; r++) {
        float* p = work.weights + r * TILE + g * GROUP + c;
        const VF weight = load<VF>(p);
        // Strips past the context hold anything: a weight of 0 stays 0.
        store(p, select(weight == 0.0f, VF{}, weight * scale));
        if constexpr (CODEC == KV_INT4) shift[r] += select(weight == 0.0f, VF{}, weight * minimum);
      }
    }
  if constexpr (CODEC == KV_INT4)
    for (int r = 0; r < R; r++) {
      float* lanes = work.shift_lanes + r * GROUP;
      store(lanes, load<VF>(lanes) + shift[r]);
    }
}

template <int CODEC, int R>
static void value_groups(const TokenGroup* groups, int at, int count, int B, int dim, Work& work, float* out) {
  constexpr int E = Elements<CODEC>::count, NV = units_at_once(R);
  if constexpr (CODEC == KV_INT8 || CODEC == KV_INT4)
    scale_weights<CODEC, R>(groups, at, count, B, work);
  int d = 0;
#ifdef KV_VNNI
  if constexpr (CODEC == KV_INT8 || CODEC == KV_INT4) {
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
        const int t = c % GROUP;
        acc += work.weights[r * TILE + c] * element_at(CODEC, groups[c / GROUP].v + (t / E * dim + d) * 4, t % E);
      }
      out[r * MAX_DIM + d] = acc;
    }
}

// ---- choosing the instance by codec and row count ---------------------------------------------------------

using GroupKernel = void (*)(const TokenGroup*, int at, int count, int B, int dim, float scale, Work&);
using ValueKernel = void (*)(const TokenGroup*, int at, int count, int B, int dim, Work&, float*);

#define KV_ROWS(NAME, C) \
  { NAME<C, 1>, NAME<C, 2>, NAME<C, 3>, NAME<C, 4>, NAME<C, 5>, NAME<C, 6>, NAME<C, 7>, NAME<C, 8> }
#define KV_CODECS(NAME)                                                                                     \
  { KV_ROWS(NAME, KV_FP32), KV_ROWS(NAME, KV_BF16), KV_ROWS(NAME, KV_FP16), KV_ROWS(NAME, KV_INT8),          \
    KV_ROWS(NAME, KV_INT4) }
static const GroupKernel score_kernels[5][MAX_ROWS] = KV_CODECS(score_groups);
static const ValueKernel value_kernels[5][MAX_ROWS] = KV_CODECS(value_groups);
#undef KV_ROWS
#undef KV_CODECS

// ---- online softmax ---------------------------------------------------------------------------------------

KV_INLINE VF soft_cap(VF x, float cap) {  // cap * tanh(x / cap), |x / cap| kept where tanh is not yet 1
  VF y = x * (1.0f / cap);
  y = select(y > 15.0f, splat(15.0f), select(y < -15.0f, splat(-15.0f), y));
  return cap - 2.0f * cap / (exp_of(y * 2.0f) + 1.0f);
}

// Soft-cap and mask one row's scores in place; returns the largest, -inf if none is visible.
KV_INLINE float prepare_scores(const KvAttention& a, int position, int first_key, int count, float* scores) {
  const int lowest = a.window > 0 ? position - a.window + 1 : 0;
  const bool all_visible = first_key >= lowest && first_key + count - 1 <= position;
  VF top = splat(-__builtin_inff());
  for (int c = 0; c < count; c += WIDTH) {
    VF s = load<VF>(scores + c);
    if (a.softcap > 0.0f) s = soft_cap(s, a.softcap);
    if (!all_visible) {
      const VI key = lane_index() + (first_key + c);
      s = select((key <= position) & (key >= lowest), s, splat(-__builtin_inff()));
    }
    if (!all_visible || a.softcap > 0.0f) store(scores + c, s);
    top = select(s > top, s, top);  // a NaN is passed over here and comes back with its weight
  }
  return horizontal_max(top);
}

KV_INLINE bool has_nan(const float* x, int count) {
  for (int c = 0; c < count; c++)
    if (x[c] != x[c]) return true;
  return false;
}

// One row's scores of groups [at, at + count) of the tile at `tile_key` -> weights; updates maximum and total.
KV_INLINE void softmax_row(const KvAttention& a, Work& work, int r, int dim, int tile_key, int at, int count) {
  float* scores = work.scores + r * TILE + at * GROUP;
  float* weights = work.weights + r * TILE + at * GROUP;
  const int columns = count * GROUP;
  const float tile_max = prepare_scores(a, work.position[r], tile_key + at * GROUP, columns, scores);
  const float old_max = work.split.maximum[r];
  float new_max = max_of(tile_max, old_max);
  if (new_max == -__builtin_inff()) {
    if (!has_nan(scores, columns)) {
      for (int c = 0; c < columns; c += WIDTH) store(weights + c, VF{});
      return;
    }
    new_max = 0.0f;
  }
  VF sum{};
  for (int c = 0; c < columns; c += WIDTH) {
    const VF w = exp_of(load<VF>(scores + c) - new_max);
    store(weights + c, w);
    sum += w;
  }
  float *total = work.total_lanes + r * GROUP, *shift = work.shift_lanes + r * GROUP;
  if (new_max != old_max) {
    const float keep = exp_of(old_max - new_max);
    store(total, load<VF>(total) * keep);
    store(shift, load<VF>(shift) * keep);
    float* acc = work.split.acc + r * MAX_DIM;
    for (int d = 0; d < dim; d++) acc[d] *= keep;
  }
  work.split.maximum[r] = new_max;
  store(total, load<VF>(total) + sum);
}

// A float V group that ends past the context: copy it with the unwritten tokens (anything, NaN too) as 0.
KV_INLINE void clear_tail(TokenGroup& group, int valid, int dim, Work& work) {
  if (is_integer(group.v_codec)) return;
  const int E = elements_per_word(group.v_codec), size = 4 / E;
  __builtin_memcpy(work.v_tail, group.v, static_cast<std::size_t>(GROUP / E) * dim * 4);
  for (int t = valid; t < GROUP; t++)
    for (int d = 0; d < dim; d++)
      __builtin_memset(work.v_tail + (t / E * dim + d) * 4 + t % E * size, 0, size);
  group.v = work.v_tail;
}

// Where the next tile's counterpart of each group lies; the group itself where there is none.
KV_INLINE void look_ahead(const KvAttention& a, const Task& task, int tile_key, int at, int stop, TokenGroup* groups) {
  const int32_t* table = a.block_table + task.seq * a.table_stride;
  for (int g = at; g < stop; g++) {
    TokenGroup ahead = groups[g];
    const int key = tile_key + TILE + g * GROUP;
    if (key < a.context_len[task.seq]) find_group(*a.cache, table, task.kv_head, key, ahead);
    groups[g].next_k = ahead.k;
    groups[g].next_v = ahead.v;
  }
}

// Keys [low, high) of one tile for all rows of the task.
static int attend_tile(const KvAttention& a, const Task& task, int tile_key, int low, int high, Work& work) {
  const KvCache& cache = *a.cache;
  const int32_t* table = a.block_table + task.seq * a.table_stride;
  const int Dk = cache.body.k.head_dim, Dv = cache.body.v.head_dim, B = cache.block_size;
  const int at = max_of(0, low - tile_key) / GROUP;
  const int stop = (min_of(high - tile_key, TILE) + GROUP - 1) / GROUP;
  TokenGroup groups[TILE / GROUP];
  for (int g = at; g < stop; g++)
    if (!find_group(cache, table, task.kv_head, tile_key + g * GROUP, groups[g])) return KV_BAD_BLOCK;
  look_ahead(a, task, tile_key, at, stop, groups);
  const int context_len = a.context_len[task.seq];
  if (tile_key + stop * GROUP > context_len)
    clear_tail(groups[stop - 1], context_len - tile_key - (stop - 1) * GROUP, Dv, work);
  for (int g = at; g < stop;) {
    int n = 1;
    while (g + n < stop && groups[g + n].k_codec == groups[g].k_codec) n++;
    score_kernels[groups[g].k_codec][task.num_rows - 1](groups, g, n, B, Dk, a.scale, work);
    g += n;
  }
  for (int r = 0; r < task.num_rows; r++) softmax_row(a, work, r, Dv, tile_key, at, stop - at);
  for (int g = at; g < stop;) {
    int n = 1;
    while (g + n < stop && groups[g + n].v_codec == groups[g].v_codec) n++;
    value_kernels[groups[g].v_codec][task.num_rows - 1](groups, g, n, B, Dv, work, work.split.acc);
    g += n;
  }
  return KV_OK;
}

static int attend_split(const KvAttention& a, const Task& task, int split, Work& work) {
  Partial& part = work.split;
  const int Dv = a.cache->body.v.head_dim;
  for (int r = 0; r < task.num_rows; r++) {
    part.maximum[r] = -__builtin_inff();
    for (int d = 0; d < Dv; d++) part.acc[r * MAX_DIM + d] = 0.0f;
    for (int i = 0; i < GROUP; i++) work.total_lanes[r * GROUP + i] = work.shift_lanes[r * GROUP + i] = 0.0f;
  }
  int low = split * SPLIT, high = min_of(low + SPLIT, work.position[task.num_rows - 1] + 1);
  if (a.window > 0) low = max_of(low, work.position[0] - a.window + 1);
  for (int key = low / TILE * TILE; key < high; key += TILE) {
    const int status = attend_tile(a, task, key, low, high, work);
    if (status != KV_OK) return status;
  }
  for (int r = 0; r < task.num_rows; r++) {
    part.total[r] = horizontal_sum(load<VF>(work.total_lanes + r * GROUP));
    const float shift = horizontal_sum(load<VF>(work.shift_lanes + r * GROUP));
    for (int d = 0; d < Dv; d++) part.acc[r * MAX_DIM + d] += shift;
  }
  return KV_OK;
}

// ---- queries in, results out --------------------------------------------------------------------------------

static void load_queries(const KvAttention& a, const Task& task, Work& work) {
  const KvCache& cache = *a.cache;
  const int Dk = cache.body.k.head_dim, H = a.num_heads, G = H / cache.num_kv_heads;
  const int start = a.query_start[task.seq], rows = a.query_start[task.seq + 1] - start;
  for (int r = 0; r < task.num_rows; r++) {
    const int row = (task.first_row + r) / G, head = task.kv_head * G + (task.first_row + r) % G;
    work.position[r] = a.context_len[task.seq] - rows + row;
    const float* source = a.q + (static_cast<int64_t>(start + row) * H + head) * Dk;
    float* q = work.q + r * MAX_DIM;
    float top = 0.0f, sum = 0.0f;
    for (int d = 0; d < Dk; d++) {
      q[d] = source[d];
      top = max_of(top, __builtin_fabsf(q[d]));
      sum += q[d];
    }
    work.q_sum[r] = sum;
    // sum - sum is NaN for a query that is not finite: its scores must not look valid.
    work.q_step[r] = top * (1.0f / 32512.0f) + (sum - sum);
    const float inverse = top > 0.0f ? 32512.0f / top : 0.0f;
    work.q_bytes_sum[r] = 0;
    if (!(top < __builtin_inff()) || sum != sum) {
      __builtin_memset(work.q_high + r * MAX_DIM, 0, Dk);
      __builtin_memset(work.q_low + r * MAX_DIM, 0, Dk);
      continue;
    }
    for (int d = 0; d < Dk; d++) {
      const int x = static_cast<int>(__builtin_rintf(q[d] * inverse));
      const int high = (x + 128) >> 8, low = x - high * 256;
      work.q_high[r * MAX_DIM + d] = static_cast<int8_t>(high);
      work.q_low[r * MAX_DIM + d] = static_cast<int8_t>(low);
      work.q_bytes_sum[r] += x;
    }
  }
}

static void merge(const Partial& part, Partial& running, int rows, int dim) {
  for (int r = 0; r < rows; r++) {
    const float old_max = running.maximum[r], new_max = max_of(part.maximum[r], old_max);
    if (part.maximum[r] == -__builtin_inff()) continue;  // nothing visible in this part
    const float keep = old_max == -__builtin_inff() ? 0.0f : exp_of(old_max - new_max);
    const float add = exp_of(part.maximum[r] - new_max);
    running.maximum[r] = new_max;
    running.total[r] = running.total[r] * keep + part.total[r] * add;
    float* acc = running.acc + r * MAX_DIM;
    const float* other = part.acc + r * MAX_DIM;
    for (int d = 0; d < dim; d++) acc[d] = acc[d] * keep + other[d] * add;
  }
}

static void finish(const KvAttention& a, const Task& task, const Partial& result) {
  const int Dv = a.cache->body.v.head_dim, H = a.num_heads, G = H / a.cache->num_kv_heads;
  for (int r = 0; r < task.num_rows; r++) {
    const int row = (task.first_row + r) / G, head = task.kv_head * G + (task.first_row + r) % G;
    const int64_t at = static_cast<int64_t>(a.query_start[task.seq] + row) * H + head;
    float maximum = result.maximum[r], total = result.total[r], keep = 1.0f;
    if (a.sinks != nullptr) {
      const float with_sink = max_of(maximum, a.sinks[head]);
      keep = exp_of(maximum - with_sink);
      total = total * keep + exp_of(a.sinks[head] - with_sink);
      maximum = with_sink;
    }
    const float factor = keep / total;
    const float* acc = result.acc + r * MAX_DIM;
    for (int d = 0; d < Dv; d++) a.out[at * Dv + d] = acc[d] * factor;
    if (a.lse != nullptr) a.lse[at] = maximum + __builtin_logf(total);
  }
}
