// Groups of tokens and the scores of one tile of keys, for one instruction set. Included in its namespace, after vec.h.
//
// Integer codes with VNNI: the query (and the softmax weights times V scale) become 16-bit fixed point, as
// two signed bytes, so a dot product is two integer products with the stored codes and a float correction.
// The rounding of the 16-bit side is 1/32512 of its largest magnitude, 128 times below int8's own.

#ifdef KV_BF16_DOT
constexpr bool has_bf16_products = true;
#else
constexpr bool has_bf16_products = false;
#endif

struct TokenGroup {
  const uint8_t* k;
  const uint8_t* v;
  const uint16_t* k_strip;
  const uint16_t* v_strip;
  const uint8_t* next_k;  // what is fetched while K is read, and while V is: see look_ahead
  const uint8_t* next_v;
  const uint8_t* k_low;  // null without a low plane
  const uint8_t* v_low;
  const uint8_t* next_k_low;  // never null: next_k where there is none
  const uint8_t* next_v_low;
  int k_form;
  int v_form;
  Basis k_basis;
  Basis v_basis;
};

// The groups of one tile; `is_uniform`: those there are have the same forms and bases.
struct KeyTile {
  TokenGroup groups[TILE / GROUP];
  bool is_uniform;
};

// One side of an arena as a task reads it: where its KV head begins in a block, and what a group of it is.
struct SideView {
  int64_t codes;
  int64_t strip;
  int64_t group_bytes;
  int64_t low;
  const KvSide* side;
  int form;       // with its low plane, if it has one
  int high_form;  // without
  Basis basis;
};

// Finds the groups of one KV head of one sequence.
struct Finder {
  const KvCache* cache;
  const int32_t* table;
  int per_block;
  int num_groups;  // of the sequence's context
  SideView k[2], v[2];  // of the body and the first arena
};

KV_INLINE SideView view_side(const KvSide& side, int B, int head, bool is_bf16) {
  const int64_t bytes = static_cast<int64_t>(GROUP / elements_per_word(side.codec)) * side.head_dim * 4;
  const int64_t first = static_cast<int64_t>(head) * (B / GROUP) * bytes;
  const int64_t strip = side.strip_offset + static_cast<int64_t>(head) * strip_values(side.codec) * B * 2;
  const bool is_dot = has_bf16_products && is_bf16 && side.codec == KV_BF16;
  return {side.codes_offset + first, strip, bytes, first, &side,
          is_dot ? BF16_DOT : form_of(side.codec, true), is_dot ? BF16_DOT : form_of(side.codec, false),
          is_rotated(side.codec) ? ROTATED : PLAIN};
}

static void view_task(const KvAttention& a, const Task& task, Finder& finder) {
  const KvCache& cache = *a.cache;
  const int B = cache.block_size;
  finder.cache = &cache;
  finder.table = a.block_table + task.seq * a.table_stride;
  finder.per_block = B / GROUP;
  finder.num_groups = (a.context_len[task.seq] + GROUP - 1) / GROUP;
  const KvArena* arenas[2] = {&cache.body, cache.first.num_blocks > 0 ? &cache.first : &cache.body};
  for (int i = 0; i < 2; i++) {
    finder.k[i] = view_side(arenas[i]->k, B, task.kv_head, a.q.is_bf16);
    finder.v[i] = view_side(arenas[i]->v, B, task.kv_head, a.q.is_bf16);
  }
}

// One side of the group `index` of block `id`, which lies at `block`. Returns whether it has its low plane.
KV_INLINE bool find_side(const SideView& view, const uint8_t* block, int64_t id, int index, const uint8_t*& codes,
                         const uint16_t*& strip, const uint8_t*& low, int& form) {
  codes = block + view.codes + index * view.group_bytes;
  strip = reinterpret_cast<const uint16_t*>(block + view.strip) + index * GROUP;
  low = nullptr;
  form = view.high_form;
  if (view.side->low == nullptr) return false;
  const uint8_t* plane = low_plane(*view.side, id);
  if (plane == nullptr) return false;
  low = plane + view.low + index * view.group_bytes;
  form = view.form;
  return true;
}

// The groups of the tile that begins at `tile_key`; `k` is null where the block table names no such block or the
// context has ended.
KV_INLINE void find_groups(const Finder& finder, int tile_key, KeyTile& tile) {
  const KvCache& cache = *finder.cache;
  const int first = tile_key / GROUP, count = min_of(TILE / GROUP, finder.num_groups - first);
  int block_index = first / finder.per_block, index = first % finder.per_block, kinds = 0;
  for (int g = 0; g < TILE / GROUP; g++) tile.groups[g].k = nullptr;
  for (int g = 0; g < count; g++, index++) {
    TokenGroup& group = tile.groups[g];
    if (index == finder.per_block) index = 0, block_index++;
    int64_t id = finder.table[block_index];
    const KvArena* arena = find_arena(cache, id);
    if (arena == nullptr) continue;
    const int which = arena == &cache.body ? 0 : 1;
    const uint8_t* block = arena->data + id * arena->block_bytes;
    const bool k_low = find_side(finder.k[which], block, id, index, group.k, group.k_strip, group.k_low, group.k_form);
    const bool v_low = find_side(finder.v[which], block, id, index, group.v, group.v_strip, group.v_low, group.v_form);
    group.k_basis = finder.k[which].basis;
    group.v_basis = finder.v[which].basis;
    kinds |= 1 << (which * 4 + k_low * 2 + v_low);
  }
  tile.is_uniform = (kinds & (kinds - 1)) == 0;
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
      if constexpr (!is_panel(CODEC)) __builtin_prefetch(next[u] + w * 64);
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
  if constexpr (Elements<CODEC>::count == 4) return word;
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
                              const uint8_t* const* next, const uint8_t* const* next_low, const Query& query, int dim,
                              VF (&out)[NU][R]) {
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
      if constexpr (CODEC == KV_N8_RH) {
        plane[u] = load<VU>(unit_low[u] + w * 64);
        __builtin_prefetch(next_low[u] + w * 64);
      }
      if constexpr (!is_panel(CODEC)) __builtin_prefetch(next[u] + w * 64);
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

#ifdef KV_BF16_DOT
KV_INLINE VF dot2(VF acc, VU words, VU pairs) {
  return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)words, (__m512bh)pairs);
}
KV_INLINE VU pair_of(const uint16_t* p) {
  uint32_t x;
  __builtin_memcpy(&x, p, 4);
  return VU{} + x;
}

// Products of bf16 with bf16, summed in float.
template <int CODEC, int R, int NU>
KV_INLINE void dot_units_bf16(const uint8_t* const* unit, const uint8_t* const* next, const uint16_t* q, int dim,
                              VF (&acc)[NU][R]) {
  for (int w = 0; w < dim / 2; w++) {
    VU word[NU];
    for (int u = 0; u < NU; u++) {
      word[u] = load<VU>(unit[u] + w * 64);
      if constexpr (!is_panel(CODEC)) __builtin_prefetch(next[u] + w * 64);
    }
    for (int r = 0; r < R; r++) {
      const VU pair = pair_of(q + r * MAX_DIM + w * 2);
      for (int u = 0; u < NU; u++) acc[u][r] = dot2(acc[u][r], word[u], pair);
    }
  }
}
#endif

template <int CODEC, int R, int NU>
KV_INLINE void score_units(const TokenGroup* groups, int first, int B, int dim, float scale, const Query& query,
                           float* scores) {
  constexpr int PER_GROUP = GROUP / WIDTH;
  const uint8_t *unit[NU], *low[NU] = {}, *next[NU], *next_low[NU] = {};
  for (int u = 0; u < NU; u++) {
    const int offset = (first + u) % PER_GROUP * WIDTH * 4;
    unit[u] = groups[(first + u) / PER_GROUP].k + offset;
    if constexpr (CODEC == KV_N8_RH) {
      low[u] = groups[(first + u) / PER_GROUP].k_low + offset;
      next_low[u] = groups[(first + u) / PER_GROUP].next_k_low + offset;
    }
    next[u] = groups[(first + u) / PER_GROUP].next_k + offset;
  }
  VF acc[NU][R] = {};
#ifdef KV_BF16_DOT
  if constexpr (base_form(CODEC) == BF16_DOT)
    dot_units_bf16<CODEC, R, NU>(unit, next, query.bf16, dim, acc);
  else
#endif
#ifdef KV_VNNI
  if constexpr (is_integer(CODEC))
    dot_units_vnni<CODEC, R, NU>(unit, low, next, next_low, query, dim, acc);
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

// Vectors beside each other, so that independent sums hide the latency of a product and still fit the registers.
constexpr int units_at_once(int form, int rows) {
  if (rows <= 2) return 4;
  return rows <= 4 || (WIDTH == 16 && !(has_byte_products && is_integer(form))) ? 2 : 1;
}

// Scores of `count` groups of one form and basis into rows of TILE (columns from the tile's group `at`).
template <int CODEC, int R>
static void score_groups(const TokenGroup* groups, int at, int count, int B, int dim, float scale,
                         const Query& query, float* scores) {
  constexpr int PER_GROUP = GROUP / WIDTH, NU = units_at_once(CODEC, R);
  int u = at * PER_GROUP;
  const int stop = (at + count) * PER_GROUP;
  for (; u + NU <= stop; u += NU) score_units<CODEC, R, NU>(groups, u, B, dim, scale, query, scores);
  for (; u < stop; u++) score_units<CODEC, R, 1>(groups, u, B, dim, scale, query, scores);
}
