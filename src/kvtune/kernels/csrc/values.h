// Weighted values of one tile of keys, and the choice of instances. Included in the namespace of one instruction set,
// after tiles.h.

// Fetches groups in the order of their lines while values are read in columns: memory, and what the processor fetches
// by itself, like lines in order. (For codes, whose products take as long as reading, counting them costs more.)
struct LineFetch {
  const TokenGroup* group;
  int64_t at, bytes;  // in what is fetched for `group`; its size
};
template <int N> KV_INLINE void fetch_lines(LineFetch& next) {
  for (int n = 0; n < N; n++) __builtin_prefetch(next.group->next_v + next.at + n * WIDTH * 4);
  next.at += N * WIDTH * 4;
  if (next.at >= next.bytes) next.at = 0, next.group++;
}

// acc[r][dims from d0] += weights x values, NV vectors of dims at a time.
template <int CODEC, int R, int NV>
KV_INLINE void add_values(const TokenGroup* groups, int at, int count, int d0, int dim, Work& work, LineFetch& fetched,
                          float* out) {
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
        if constexpr (!is_panel(CODEC) && has_scale(CODEC)) __builtin_prefetch(next + n * WIDTH * 4);
      }
      if constexpr (!is_panel(CODEC) && !has_scale(CODEC)) fetch_lines<NV>(fetched);
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
        if constexpr (CODEC == KV_N8_RH) {
          const int at_word = (row * dim + d0 + n * WIDTH) * 4;
          plane[n] = load<VU>(groups[g].v_low + at_word);
          __builtin_prefetch(groups[g].next_v_low + at_word);
        }
        if constexpr (!is_panel(CODEC)) __builtin_prefetch(next + n * WIDTH * 4);
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

// work.weights of N groups, times V's steps, -> bytes and their sum; step[r] = 0 where all weights are 0, NaN where
// one is not finite. Adds weight x base, which every dim gets, to `shift_lanes`. `keep`: dims that fill no vector
// will want the product in float too.
template <int CODEC, int N>
static void quantise_weights(const TokenGroup* groups, int rows, int B, bool keep, Work& work, int at,
                             float* shift_lanes, int32_t* sums, float* step) {
  static_assert(TILE == 4 * GROUP);
  VF scale[N], base[N];
  for (int n = 0; n < N; n++) {
    const VF stored = load_halves(groups[at + n].v_strip);
    scale[n] = step_of<CODEC>(stored);
    if constexpr (has_base(CODEC)) base[n] = base_of<CODEC>(stored, load_halves(groups[at + n].v_strip + B));
  }
  for (int r = 0; r < rows; r++) {
    float* w = work.weights + r * TILE + at * GROUP;
    VF x[N], shift{};
    VI largest{};  // weights are not negative: their bits order as integers, NaN above all
    for (int n = 0; n < N; n++) {
      const VF weight = load<VF>(w + n * GROUP);
      const VI counts = weight != 0.0f;  // strips past the context hold anything: a weight of 0 stays 0
      x[n] = select(counts, weight * scale[n], VF{});
      if constexpr (has_base(CODEC)) shift += select(counts, weight * base[n], VF{});
      largest = (VI)_mm512_max_epi32((__m512i)largest, (__m512i)((VI)x[n] & 0x7fffffff));
    }
    if constexpr (has_base(CODEC)) {
      float* lanes = shift_lanes + r * GROUP;
      store(lanes, load<VF>(lanes) + shift);
    }
    if (keep)
      for (int n = 0; n < N; n++) store(w + n * GROUP, x[n]);
    const int32_t bits = _mm512_reduce_max_epi32((__m512i)largest);
    float top;
    __builtin_memcpy(&top, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float inverse = finite && top > 0.0f ? 32512.0f / top : 0.0f;
    step[r] = finite ? top * (1.0f / 32512.0f) : __builtin_nanf("");
    VI sum{};
    for (int n = 0; n < N; n++) {
      const VI fixed = (VI)_mm512_cvtps_epi32((__m512)(x[n] * inverse)), high = (fixed + 128) >> 8;
      const int column = r * TILE + (at + n) * GROUP;
      sum += fixed;
      _mm_storeu_si128((__m128i*)(work.w_high + column), _mm512_cvtepi32_epi8((__m512i)high));
      _mm_storeu_si128((__m128i*)(work.w_low + column), _mm512_cvtepi32_epi8((__m512i)fixed));
    }
    sums[r] = horizontal_sum(sum);
  }
}
#endif

#ifdef KV_BF16_DOT
// Weights and values as bf16, summed in float. (Weights in float, or in two halves of bf16, were measured on Zen 5:
// 3 to 16 % more time at decode, 24 to 36 % at prefill.)
template <int CODEC, int R, int NV>
KV_INLINE void add_values_bf16(const TokenGroup* groups, int at, int count, int d0, int dim, const Work& work,
                               LineFetch& fetched, float* out) {
  VF acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) acc[r][n] = load<VF>(out + r * MAX_DIM + d0 + n * WIDTH);
  for (int g = at; g < at + count; g++) {
    const uint8_t* base = groups[g].v + d0 * 4;
    for (int row = 0; row < GROUP / 2; row++, base += dim * 4) {
      VU word[NV];
      for (int n = 0; n < NV; n++) word[n] = load<VU>(base + n * WIDTH * 4);
      if constexpr (!is_panel(CODEC)) fetch_lines<NV>(fetched);
      for (int r = 0; r < R; r++) {
        const VU pair = pair_of(work.w_bf16 + r * TILE + g * GROUP + row * 2);
        for (int n = 0; n < NV; n++) acc[r][n] = dot2(acc[r][n], word[n], pair);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < NV; n++) store(out + r * MAX_DIM + d0 + n * WIDTH, acc[r][n]);
}

KV_INLINE void round_weights(int rows, int at, int count, Work& work) {
  for (int r = 0; r < rows; r++)
    for (int c = at * GROUP; c < (at + count) * GROUP; c += WIDTH)
      store(work.w_bf16 + r * TILE + c, _mm512_cvtneps_pbh((__m512)load<VF>(work.weights + r * TILE + c)));
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
  constexpr int E = Elements<CODEC>::count, NV = units_at_once(CODEC, R);
  if constexpr (has_scale(CODEC) && !(has_byte_products && is_integer(CODEC)))
    scale_weights<CODEC, R>(groups, at, count, B, work, shift_lanes);
  LineFetch fetched{groups + at, 0, GROUP / E * dim * 4};
  int d = 0;
#ifdef KV_BF16_DOT
  if constexpr (base_form(CODEC) == BF16_DOT) {
    round_weights(R, at, count, work);
    for (; d + NV * WIDTH <= dim; d += NV * WIDTH)
      add_values_bf16<CODEC, R, NV>(groups, at, count, d, dim, work, fetched, out);
    for (; d + WIDTH <= dim; d += WIDTH)
      add_values_bf16<CODEC, R, 1>(groups, at, count, d, dim, work, fetched, out);
  }
#endif
#ifdef KV_VNNI
  if constexpr (is_integer(CODEC)) {
    int32_t sums[R];
    float step[R];
    const bool keep = dim % WIDTH != 0;
    switch (count) {
      case 1: quantise_weights<CODEC, 1>(groups, R, B, keep, work, at, shift_lanes, sums, step); break;
      case 2: quantise_weights<CODEC, 2>(groups, R, B, keep, work, at, shift_lanes, sums, step); break;
      case 3: quantise_weights<CODEC, 3>(groups, R, B, keep, work, at, shift_lanes, sums, step); break;
      default: quantise_weights<CODEC, 4>(groups, R, B, keep, work, at, shift_lanes, sums, step);
    }
    for (; d + NV * WIDTH <= dim; d += NV * WIDTH)
      add_values_vnni<CODEC, R, NV>(groups, at, count, d, dim, work, sums, step, out);
    for (; d + WIDTH <= dim; d += WIDTH)
      add_values_vnni<CODEC, R, 1>(groups, at, count, d, dim, work, sums, step, out);
  }
#endif
  for (; d + NV * WIDTH <= dim; d += NV * WIDTH)
    add_values<CODEC, R, NV>(groups, at, count, d, dim, work, fetched, out);
  for (; d + WIDTH <= dim; d += WIDTH) add_values<CODEC, R, 1>(groups, at, count, d, dim, work, fetched, out);
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
#define KV_PANEL(NAME, C) NAME<C | PANEL, MAX_ROWS>
#define KV_FORMS(EACH, NAME)                                                                              \
  { EACH(NAME, KV_FP32), EACH(NAME, KV_BF16), EACH(NAME, KV_FP16), EACH(NAME, KV_INT8), EACH(NAME, KV_INT4), \
    EACH(NAME, KV_FP8), EACH(NAME, KV_N8_RH), EACH(NAME, KV_N4_RH), EACH(NAME, KV_BF16_OR_DOT) }
#ifdef KV_BF16_DOT
#define KV_BF16_OR_DOT BF16_DOT
#else
#define KV_BF16_OR_DOT KV_BF16  // never asked for
#endif
static const GroupKernel score_kernels[NUM_FORMS][MAX_ROWS] = KV_FORMS(KV_ROWS, score_groups);
static const ValueKernel value_kernels[NUM_FORMS][MAX_ROWS] = KV_FORMS(KV_ROWS, value_groups);
static const GroupKernel panel_score_kernels[NUM_FORMS] = KV_FORMS(KV_PANEL, score_groups);
static const ValueKernel panel_value_kernels[NUM_FORMS] = KV_FORMS(KV_PANEL, value_groups);
#undef KV_ROWS
#undef KV_PANEL
#undef KV_FORMS
#undef KV_BF16_OR_DOT

KV_INLINE GroupKernel score_kernel(int form, int rows) {
  return is_panel(form) ? panel_score_kernels[form_index(form)] : score_kernels[form_index(form)][rows - 1];
}
KV_INLINE ValueKernel value_kernel(int form, int rows) {
  return is_panel(form) ? panel_value_kernels[form_index(form)] : value_kernels[form_index(form)][rows - 1];
}
