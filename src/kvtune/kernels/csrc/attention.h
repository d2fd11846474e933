// Paged attention for one instruction set. Included inside its namespace, after panel.h.
//
// Loop nest: a task's query rows share a KV head, in bands of up to 8. Keys come in tiles of 64 at fixed absolute
// positions, found and (for many bands) unpacked once; per tile and band the scores, an online softmax step, then
// the values: FlashAttention's order (Dao, 2022) with the decode path as its case of one band.
// A row's sums run in one fixed order whatever rows are computed beside it.
//
// Keys and values of rotated codecs stay rotated: the query is rotated once, the sum of values once per split.
// Encoding took a centre from each of their keys; a row gets its score q . centre back, so that sinks, soft-caps
// and neighbours that are not centred see what they would have seen.

// ---- online softmax ---------------------------------------------------------------------------------------

KV_INLINE VF soft_cap(VF x, float cap) {  // cap * tanh(x / cap), |x / cap| kept where tanh is not yet 1
  VF y = x * (1.0f / cap);
  y = select(y > 15.0f, splat(15.0f), select(y < -15.0f, splat(-15.0f), y));
  return cap - 2.0f * cap / (exp_of(y * 2.0f) + 1.0f);
}

KV_INLINE VF larger(VF a, VF b) { return select(a > b, a, b); }  // the second where one is NaN

// Soft-cap and mask one row's scores in place; returns the largest, -inf if none is visible. A NaN is passed over
// here and comes back with its weight.
KV_INLINE float prepare_scores(const KvAttention& a, int position, int first_key, int count, float* scores) {
  const int lowest = a.window > 0 ? position - a.window + 1 : 0;
  const bool all_visible = first_key >= lowest && first_key + count - 1 <= position;
  VF top = splat(-__builtin_inff());
  if (all_visible && !(a.softcap > 0.0f)) {
    for (int c = 0; c < count; c += WIDTH) top = larger(load<VF>(scores + c), top);
    return horizontal_max(top);
  }
  for (int c = 0; c < count; c += WIDTH) {
    VF s = load<VF>(scores + c);
    if (a.softcap > 0.0f) s = soft_cap(s, a.softcap);
    if (!all_visible) {
      const VI key = lane_index() + (first_key + c);
      s = select((key <= position) & (key >= lowest), s, splat(-__builtin_inff()));
    }
    store(scores + c, s);
    top = larger(s, top);
  }
  return horizontal_max(top);
}

KV_INLINE bool has_nan(const float* x, int count) {
  for (int c = 0; c < count; c++)
    if (x[c] != x[c]) return true;
  return false;
}

KV_INLINE float* values_of(Band& band, int basis) { return basis == ROTATED ? band.rotated_acc : band.split.acc; }

// A larger maximum was found: what the row has summed up counts less.
KV_INLINE void rescale_row(Work& work, Band& band, int r, int dim, float keep) {
  float* total = band.total_lanes + r * GROUP;
  for (int c = 0; c < GROUP; c += WIDTH) store(total + c, load<VF>(total + c) * keep);
  for (int basis = 0; basis < NUM_BASES; basis++) {
    if (!work.has_values[basis]) continue;
    float *shift = band.shift_lanes[basis] + r * GROUP, *acc = values_of(band, basis) + r * MAX_DIM;
    for (int c = 0; c < GROUP; c += WIDTH) store(shift + c, load<VF>(shift + c) * keep);
    for (int d = 0; d < dim; d++) acc[d] *= keep;
  }
}

// Scores of groups [at, at + count) of the tile at `tile_key` -> weights; updates maximum and total. The maxima of all
// rows first, so that one row's chain of dependent instructions hides another's.
KV_INLINE void softmax_rows(const KvAttention& a, Work& work, Band& band, int dim, int tile_key, int at, int count) {
  const int columns = count * GROUP, rows = band.num_rows;
  float top[MAX_ROWS];
  for (int r = 0; r < rows; r++)
    top[r] = prepare_scores(a, band.position[r], tile_key + at * GROUP, columns, work.scores + r * TILE + at * GROUP);
  for (int r = 0; r < rows; r++) {
    const float *scores = work.scores + r * TILE + at * GROUP, old_max = band.split.maximum[r];
    float *weights = work.weights + r * TILE + at * GROUP, *total = band.total_lanes + r * GROUP;
    float new_max = max_of(top[r], old_max);
    if (new_max == -__builtin_inff()) {
      if (!has_nan(scores, columns)) {  // nothing visible yet
        for (int c = 0; c < columns; c += WIDTH) store(weights + c, VF{});
        continue;
      }
      new_max = 0.0f;
    }
    if (new_max != old_max) rescale_row(work, band, r, dim, exp_of(old_max - new_max));
    VF sum{};
    for (int c = 0; c < columns; c += WIDTH) {
      const VF w = exp_of(load<VF>(scores + c) - new_max);
      store(weights + c, w);
      sum += w;
    }
    band.split.maximum[r] = new_max;
    store(total, load<VF>(total) + sum);
  }
}

// A float V group that ends past the context: copy it with the unwritten tokens (anything, NaN too) as 0.
KV_INLINE void clear_tail(TokenGroup& group, int valid, int dim, Work& work) {
  if (has_scale(group.v_form)) return;  // codes are always finite, and a strip counts only with its weight
  const int E = elements_per_word(group.v_form), full = valid / E;
  const std::size_t row_bytes = static_cast<std::size_t>(dim) * 4;
  __builtin_memset(work.v_tail, 0, row_bytes * (GROUP / E));
  __builtin_memcpy(work.v_tail, group.v, row_bytes * full);
  for (int d = 0; d < dim && valid % E != 0; d++)  // the first of the two tokens of a word
    __builtin_memcpy(work.v_tail + row_bytes * full + d * 4, group.v + row_bytes * full + d * 4, 2);
  group.v = work.v_tail;
}

// How many groups from `g` on share the form and basis of one side.
KV_INLINE int run_of_keys(const KeyTile& tile, int g, int stop) {
  if (tile.is_uniform) return stop - g;
  int n = 1;
  const TokenGroup *groups = tile.groups + g;
  while (g + n < stop && groups[n].k_form == groups->k_form && groups[n].k_basis == groups->k_basis) n++;
  return n;
}
KV_INLINE int run_of_values(const KeyTile& tile, int g, int stop) {
  if (tile.is_uniform) return stop - g;
  int n = 1;
  const TokenGroup *groups = tile.groups + g;
  while (g + n < stop && groups[n].v_form == groups->v_form && groups[n].v_basis == groups->v_basis) n++;
  return n;
}

// Keys [low, high) of one tile for the rows of one band.
static void attend_groups(const KvAttention& a, const KeyTile& tile, int tile_key, int low, int high, Work& work,
                          Band& band) {
  const int Dk = a.cache->body.k.head_dim, Dv = a.cache->body.v.head_dim, B = a.cache->block_size;
  const int at = max_of(0, low - tile_key) / GROUP;
  const int stop = (min_of(high - tile_key, TILE) + GROUP - 1) / GROUP;
  const TokenGroup* groups = tile.groups;
  for (int g = at, n = 0; g < stop; g += n) {
    n = run_of_keys(tile, g, stop);
    score_kernel(groups[g].k_form, band.num_rows)(groups, g, n, B, Dk, a.scale, band.query[groups[g].k_basis],
                                                  work.scores);
  }
  softmax_rows(a, work, band, Dv, tile_key, at, stop - at);
  for (int g = at, n = 0; g < stop; g += n) {
    n = run_of_values(tile, g, stop);
    const int basis = groups[g].v_basis;
    value_kernel(groups[g].v_form, band.num_rows)(groups, g, n, B, Dv, work, band.shift_lanes[basis],
                                                  values_of(band, basis));
  }
}

struct KeyRange {
  int low, high;
};

// The task's keys of a split that some row of the band sees; empty where high <= low.
KV_INLINE KeyRange visible_keys(const KvAttention& a, const Task& task, int split, const Band& band) {
  const int low = max_of(split * SPLIT, task.first_key);
  const int high = min_of(min_of(split * SPLIT + SPLIT, task.stop_key), band.position[band.num_rows - 1] + 1);
  return {a.window > 0 ? max_of(low, band.position[0] - a.window + 1) : low, high};
}

// What is fetched meanwhile. While keys of `group` are read, those of `next`, a tile later, likewise values; its
// strips, a line or two a side, at once. Two tiles of floats do not fit an L1: there the values of `group` come while
// its keys are read (`has_equal_sides`), then the next keys.
KV_INLINE void look_ahead(TokenGroup& group, const TokenGroup& next, int B, bool has_equal_sides) {
  const bool is_half_ahead = has_equal_sides && !has_scale(group.k_form) && group.k_form == group.v_form;
  group.next_k = is_half_ahead ? group.v : next.k;
  group.next_v = is_half_ahead ? next.k : next.v;
  group.next_k_low = next.k_low == nullptr ? next.k : next.k_low;
  group.next_v_low = next.v_low == nullptr ? next.v : next.v_low;
  if (has_scale(next.k_form)) __builtin_prefetch(next.k_strip);
  if (has_base(next.k_form)) __builtin_prefetch(next.k_strip + B);
  if (has_scale(next.v_form)) __builtin_prefetch(next.v_strip);
  if (has_base(next.v_form)) __builtin_prefetch(next.v_strip + B);
}

// One tile for all rows of the task: its groups are unpacked, where it pays, once. `next`: those of the tile after it.
static int attend_tile(const KvAttention& a, const Task& task, int tile_key, const KeyRange* ranges, KeyTile& tile,
                       const KeyTile& next_tile, Work& work) {
  TokenGroup* groups = tile.groups;
  const TokenGroup* next = next_tile.groups;
  const int Dk = a.cache->body.k.head_dim, Dv = a.cache->body.v.head_dim, bands = num_bands(task);
  const int at = max_of(0, ranges[0].low - tile_key) / GROUP;
  const int stop = (min_of(ranges[bands - 1].high - tile_key, TILE) + GROUP - 1) / GROUP;
  for (int g = at; g < stop; g++) {
    if (groups[g].k == nullptr) return KV_BAD_BLOCK;
    look_ahead(groups[g], next[g].k == nullptr ? groups[g] : next[g], a.cache->block_size,
               Dk == Dv && bands < PANEL_BANDS);
  }
  const int context_len = a.context_len[task.seq];
  if (tile_key + stop * GROUP > context_len)
    clear_tail(groups[stop - 1], context_len - tile_key - (stop - 1) * GROUP, Dv, work);
  if (bands >= PANEL_BANDS) unpack_tile(groups, at, stop, Dk, Dv, work);
  for (int b = 0; b < bands; b++)
    if (ranges[b].high > tile_key && ranges[b].low < tile_key + TILE && ranges[b].high > ranges[b].low)
      attend_groups(a, tile, tile_key, ranges[b].low, ranges[b].high, work, work.band[b]);
  return KV_OK;
}

// The rotated values of one row, back in the model's basis, join the others.
static void add_rotated(Band& band, int r, int dim) {
  float* rotated = band.rotated_acc + r * MAX_DIM;
  const float shift = horizontal_sum(load<VF>(band.shift_lanes[ROTATED] + r * GROUP));
  for (int d = 0; d < dim; d++) rotated[d] += shift;
  rotate(rotated, dim);
  for (int d = 0; d < dim; d++) band.split.acc[r * MAX_DIM + d] += rotated[d];
}

static void begin_split(Band& band, int dim) {
  for (int r = 0; r < band.num_rows; r++) {
    band.split.maximum[r] = -__builtin_inff();
    for (int d = 0; d < dim; d++) band.split.acc[r * MAX_DIM + d] = band.rotated_acc[r * MAX_DIM + d] = 0.0f;
    for (int i = 0; i < GROUP; i++) {
      band.total_lanes[r * GROUP + i] = 0.0f;
      band.shift_lanes[PLAIN][r * GROUP + i] = band.shift_lanes[ROTATED][r * GROUP + i] = 0.0f;
    }
  }
}

static void end_split(Band& band, int dim, bool has_rotated) {
  Partial& part = band.split;
  for (int r = 0; r < band.num_rows; r++) {
    part.total[r] = horizontal_sum(load<VF>(band.total_lanes + r * GROUP));
    const float shift = horizontal_sum(load<VF>(band.shift_lanes[PLAIN] + r * GROUP));
    for (int d = 0; d < dim; d++) part.acc[r * MAX_DIM + d] += shift;
    if (has_rotated) add_rotated(band, r, dim);
  }
}

// Move `count` floats from a row to its state, or back.
KV_INLINE void move_floats(float* row, float*& state, int count, bool is_saved) {
  __builtin_memcpy(is_saved ? state : row, is_saved ? row : state, static_cast<std::size_t>(count) * 4);
  state += count;
}

// A band's rows in the middle of a split, to the task's state or from it.
static void move_open_split(const Task& task, int b, int dim, Band& band, bool is_saved) {
  for (int r = 0; r < band_rows(task, b); r++) {
    float* state = task.state + (b * MAX_ROWS + r) * state_size(dim) + 2 + dim;
    move_floats(band.split.maximum + r, state, 1, is_saved);
    move_floats(band.total_lanes + r * GROUP, state, GROUP, is_saved);
    for (int basis = 0; basis < NUM_BASES; basis++)
      move_floats(band.shift_lanes[basis] + r * GROUP, state, GROUP, is_saved);
    move_floats(band.split.acc + r * MAX_DIM, state, dim, is_saved);
    move_floats(band.rotated_acc + r * MAX_DIM, state, dim, is_saved);
  }
}

static int attend_split(const KvAttention& a, const Task& task, int split, Work& work) {
  const int Dv = a.cache->body.v.head_dim, bands = num_bands(task);
  KeyRange ranges[MAX_BANDS];
  for (int b = 0; b < bands; b++) {
    begin_split(work.band[b], Dv);
    if (begins_open(task, split)) move_open_split(task, b, Dv, work.band[b], false);
    ranges[b] = visible_keys(a, task, split, work.band[b]);
  }
  KeyTile tiles[2];  // the present one and the next, in turn
  Finder finder;
  view_task(a, task, finder);
  const int first = ranges[0].low / TILE * TILE;
  find_groups(finder, first, tiles[0]);
  for (int key = first, i = 0; key < ranges[bands - 1].high; key += TILE, i ^= 1) {
    find_groups(finder, key + TILE, tiles[i ^ 1]);
    const int status = attend_tile(a, task, key, ranges, tiles[i], tiles[i ^ 1], work);
    if (status != KV_OK) return status;
  }
  for (int b = 0; b < bands; b++) {
    if (ends_open(task, split)) move_open_split(task, b, Dv, work.band[b], true);
    else end_split(work.band[b], Dv, work.has_values[ROTATED]);
  }
  return KV_OK;
}

// ---- queries in, results out --------------------------------------------------------------------------------

// Row r of `query.q`, zeros up to a whole vector, -> 16-bit fixed point and its sums.
static void quantise_query(Query& query, int r, int dim) {
  const float* q = query.q + r * MAX_DIM;
  int8_t *high = query.high + r * MAX_DIM, *low = query.low + r * MAX_DIM;
  VF tops{}, sums{};
  for (int d = 0; d < dim; d += WIDTH) {
    const VF x = load<VF>(q + d), magnitude = as_float((VU)x & 0x7fffffffu);
    tops = select(magnitude > tops, magnitude, tops);
    sums += x;
  }
  const float top = horizontal_max(tops), sum = horizontal_sum(sums);
  query.sum[r] = sum;
  // sum - sum is NaN for a query that is not finite: its scores must not look valid.
  query.step[r] = top * (1.0f / 32512.0f) + (sum - sum);
  query.bytes_sum[r] = 0;
  const bool is_finite = top < __builtin_inff() && sum == sum;
  const float inverse = is_finite && top > 0.0f ? 32512.0f / top : 0.0f;
  VI bytes_sum{};
  for (int d = 0; d < dim; d += WIDTH) {
    const VF shifted = load<VF>(q + d) * inverse + 12582912.0f;  // rounds to nearest even
    const VI x = is_finite ? (VI)shifted - 0x4b400000 : VI{}, upper = (x + 128) >> 8;
    store(high + d, __builtin_convertvector(upper, VB));
    store(low + d, __builtin_convertvector(x - upper * 256, VB));
    bytes_sum += x;
  }
  query.bytes_sum[r] = horizontal_sum(bytes_sum);
}

// Which bases a side's blocks are in; the centre of those that are rotated (the body's where both arenas are).
KV_INLINE const float* find_bases(const KvCache& cache, const KvSide KvArena::*side, bool (&found)[NUM_BASES]) {
  const KvSide &body = cache.body.*side, &first = cache.first.*side;
  const bool has_first = cache.first.num_blocks > 0;
  found[ROTATED] = is_rotated(body.codec) || (has_first && is_rotated(first.codec));
  found[PLAIN] = !is_rotated(body.codec) || (has_first && !is_rotated(first.codec));
  return is_rotated(body.codec) ? body.centre : first.centre;
}

// The query head of row r of a task.
KV_INLINE int head_of(const KvAttention& a, const Task& task, int r) {
  return task.kv_head * (a.num_heads / a.cache->num_kv_heads) + task.rows[r].member;
}

// Row r of `query`: the source's values in its basis, then in fixed point where codes ask for it.
static void load_query(const KvRows& source, int row, int head, const float* centre, int basis, float scale, int dim,
                       bool wants_fixed, Query& query, int r) {
  float* q = query.q + r * MAX_DIM;
  read_row(source, row, head, dim, q);
  for (int d = dim; d % WIDTH != 0; d++) q[d] = 0.0f;
  float score = 0.0f;
  if (basis == ROTATED && centre != nullptr)
    for (int d = 0; d < dim; d++) score += q[d] * centre[d];
  query.centre[r] = score * scale;
  if (basis == ROTATED) rotate(q, dim);
  if (wants_fixed) quantise_query(query, r, dim);
  if (has_bf16_products && source.is_bf16 && basis == PLAIN)
    __builtin_memcpy(query.bf16 + r * MAX_DIM, bf16_row(source, row, head), static_cast<std::size_t>(dim) * 2);
}

static void load_queries(const KvAttention& a, const Task& task, Work& work) {
  const KvCache& cache = *a.cache;
  const int Dk = cache.body.k.head_dim, bands = num_bands(task);
  bool has_keys[NUM_BASES];
  find_bases(cache, &KvArena::v, work.has_values);
  const float* centre = find_bases(cache, &KvArena::k, has_keys);
  if (centre != nullptr) centre += static_cast<int64_t>(task.kv_head) * Dk;
  const bool wants_fixed = has_scale(cache.body.k.codec) || (cache.first.num_blocks > 0 && has_scale(cache.first.k.codec));
  for (int b = 0; b < bands; b++) {
    Band& band = work.band[b];
    band.num_rows = bands >= PANEL_BANDS ? MAX_ROWS : band_rows(task, b);
    for (int r = 0; r < band.num_rows; r++) {
      const int row = min_of(b * MAX_ROWS + r, task.num_rows - 1);
      band.position[r] = task.rows[row].position;
      for (int basis = 0; basis < NUM_BASES; basis++)
        if (has_keys[basis])
          load_query(a.q, task.rows[row].row, head_of(a, task, row), centre, basis, a.scale, Dk, wants_fixed,
                     band.query[basis], r);
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

// `acc` x factor to out, as bf16 rounded to nearest even.
KV_INLINE void store_row(void* out, int64_t at, bool is_bf16, const float* acc, float factor, int dim) {
  if (!is_bf16) {
    float* row = static_cast<float*>(out) + at;
    for (int d = 0; d < dim; d++) row[d] = acc[d] * factor;
    return;
  }
  uint16_t* row = static_cast<uint16_t*>(out) + at;
  for (int d = 0; d < dim; d++) row[d] = to_bf16(acc[d] * factor);
}

static void finish(const KvAttention& a, const Task& task, int band, const Partial& result) {
  const int Dv = a.cache->body.v.head_dim;
  for (int r = 0; r < band_rows(task, band); r++) {
    const int head = head_of(a, task, band * MAX_ROWS + r);
    const int64_t at = static_cast<int64_t>(task.rows[band * MAX_ROWS + r].row) * a.num_heads + head;
    float maximum = result.maximum[r], total = result.total[r], keep = 1.0f;
    if (a.sinks != nullptr) {
      const float sink = a.sinks[head], with_sink = max_of(maximum, sink);
      keep = exp_of(maximum - with_sink);
      total = total * keep + exp_of(sink - with_sink);
      maximum = with_sink;
    }
    const float factor = keep / total;
    const float* acc = result.acc + r * MAX_DIM;
    store_row(a.out, at * Dv, a.q.is_bf16, acc, factor, Dv);
    if (a.lse != nullptr) a.lse[at] = maximum + __builtin_logf(total);
  }
}
