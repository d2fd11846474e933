// Paged attention for one instruction set. Included inside its namespace, after tiles.h.
//
// Loop nest: keys in tiles of 64 at fixed absolute positions; per tile the scores of up to 8 query rows that
// share a KV head (so K and V are read once for all of them), an online softmax step, then the values.
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

KV_INLINE float* values_of(Work& work, int basis) { return basis == ROTATED ? work.rotated_acc : work.split.acc; }

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
  float* total = work.total_lanes + r * GROUP;
  if (new_max != old_max) {
    const float keep = exp_of(old_max - new_max);
    store(total, load<VF>(total) * keep);
    for (int basis = 0; basis < NUM_BASES; basis++) {
      if (!work.has_values[basis]) continue;
      float *shift = work.shift_lanes[basis] + r * GROUP, *acc = values_of(work, basis) + r * MAX_DIM;
      store(shift, load<VF>(shift) * keep);
      for (int d = 0; d < dim; d++) acc[d] *= keep;
    }
  }
  work.split.maximum[r] = new_max;
  store(total, load<VF>(total) + sum);
}

// A float V group that ends past the context: copy it with the unwritten tokens (anything, NaN too) as 0.
KV_INLINE void clear_tail(TokenGroup& group, int valid, int dim, Work& work) {
  if (has_scale(group.v_form)) return;  // codes are always finite, and a strip counts only with its weight
  const int E = elements_per_word(group.v_form), size = 4 / E;
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
    while (g + n < stop && groups[g + n].k_form == groups[g].k_form && groups[g + n].k_basis == groups[g].k_basis) n++;
    score_kernels[form_index(groups[g].k_form)][task.num_rows - 1](groups, g, n, B, Dk, a.scale,
                                                                   work.query[groups[g].k_basis], work.scores);
    g += n;
  }
  for (int r = 0; r < task.num_rows; r++) softmax_row(a, work, r, Dv, tile_key, at, stop - at);
  for (int g = at; g < stop;) {
    int n = 1;
    while (g + n < stop && groups[g + n].v_form == groups[g].v_form && groups[g + n].v_basis == groups[g].v_basis) n++;
    const int basis = groups[g].v_basis;
    value_kernels[form_index(groups[g].v_form)][task.num_rows - 1](groups, g, n, B, Dv, work, work.shift_lanes[basis],
                                                                   values_of(work, basis));
    g += n;
  }
  return KV_OK;
}

// The rotated values of one row, back in the model's basis, join the others.
static void add_rotated(Work& work, int r, int dim) {
  float* rotated = work.rotated_acc + r * MAX_DIM;
  const float shift = horizontal_sum(load<VF>(work.shift_lanes[ROTATED] + r * GROUP));
  for (int d = 0; d < dim; d++) rotated[d] += shift;
  rotate(rotated, dim);
  for (int d = 0; d < dim; d++) work.split.acc[r * MAX_DIM + d] += rotated[d];
}

static int attend_split(const KvAttention& a, const Task& task, int split, Work& work) {
  Partial& part = work.split;
  const int Dv = a.cache->body.v.head_dim;
  for (int r = 0; r < task.num_rows; r++) {
    part.maximum[r] = -__builtin_inff();
    for (int d = 0; d < Dv; d++) part.acc[r * MAX_DIM + d] = work.rotated_acc[r * MAX_DIM + d] = 0.0f;
    for (int i = 0; i < GROUP; i++) {
      work.total_lanes[r * GROUP + i] = 0.0f;
      work.shift_lanes[PLAIN][r * GROUP + i] = work.shift_lanes[ROTATED][r * GROUP + i] = 0.0f;
    }
  }
  int low = split * SPLIT, high = min_of(low + SPLIT, work.position[task.num_rows - 1] + 1);
  if (a.window > 0) low = max_of(low, work.position[0] - a.window + 1);
  for (int key = low / TILE * TILE; key < high; key += TILE) {
    const int status = attend_tile(a, task, key, low, high, work);
    if (status != KV_OK) return status;
  }
  for (int r = 0; r < task.num_rows; r++) {
    part.total[r] = horizontal_sum(load<VF>(work.total_lanes + r * GROUP));
    const float shift = horizontal_sum(load<VF>(work.shift_lanes[PLAIN] + r * GROUP));
    for (int d = 0; d < Dv; d++) part.acc[r * MAX_DIM + d] += shift;
    if (work.has_values[ROTATED]) add_rotated(work, r, Dv);
  }
  return KV_OK;
}

// ---- queries in, results out --------------------------------------------------------------------------------

// Row r of `query.q` -> 16-bit fixed point and its sums.
static void quantise_query(Query& query, int r, int dim) {
  const float* q = query.q + r * MAX_DIM;
  int8_t *high = query.high + r * MAX_DIM, *low = query.low + r * MAX_DIM;
  float top = 0.0f, sum = 0.0f;
  for (int d = 0; d < dim; d++) {
    top = max_of(top, __builtin_fabsf(q[d]));
    sum += q[d];
  }
  query.sum[r] = sum;
  // sum - sum is NaN for a query that is not finite: its scores must not look valid.
  query.step[r] = top * (1.0f / 32512.0f) + (sum - sum);
  const float inverse = top > 0.0f ? 32512.0f / top : 0.0f;
  query.bytes_sum[r] = 0;
  if (!(top < __builtin_inff()) || sum != sum) {
    __builtin_memset(high, 0, dim);
    __builtin_memset(low, 0, dim);
    return;
  }
  for (int d = 0; d < dim; d++) {
    const int x = static_cast<int>(__builtin_rintf(q[d] * inverse));
    high[d] = static_cast<int8_t>((x + 128) >> 8);
    low[d] = static_cast<int8_t>(x - high[d] * 256);
    query.bytes_sum[r] += x;
  }
}

// Which bases a side's blocks are in; the centre of those that are rotated (the body's where both arenas are).
KV_INLINE const float* find_bases(const KvCache& cache, const KvSide KvArena::*side, bool (&found)[NUM_BASES]) {
  const KvSide &body = cache.body.*side, &first = cache.first.*side;
  const bool has_first = cache.first.num_blocks > 0;
  found[ROTATED] = is_rotated(body.codec) || (has_first && is_rotated(first.codec));
  found[PLAIN] = !is_rotated(body.codec) || (has_first && !is_rotated(first.codec));
  return is_rotated(body.codec) ? body.centre : first.centre;
}

static void load_queries(const KvAttention& a, const Task& task, Work& work) {
  const KvCache& cache = *a.cache;
  const int Dk = cache.body.k.head_dim, H = a.num_heads, G = H / cache.num_kv_heads;
  const int start = a.query_start[task.seq], rows = a.query_start[task.seq + 1] - start;
  bool has_keys[NUM_BASES];
  find_bases(cache, &KvArena::v, work.has_values);
  const float* centre = find_bases(cache, &KvArena::k, has_keys);
  if (centre != nullptr) centre += static_cast<int64_t>(task.kv_head) * Dk;
  for (int r = 0; r < task.num_rows; r++) {
    const int row = (task.first_row + r) / G, head = task.kv_head * G + (task.first_row + r) % G;
    work.position[r] = a.context_len[task.seq] - rows + row;
    const float* source = a.q + (static_cast<int64_t>(start + row) * H + head) * Dk;
    for (int basis = 0; basis < NUM_BASES; basis++) {
      if (!has_keys[basis]) continue;
      Query& query = work.query[basis];
      float* q = query.q + r * MAX_DIM;
      for (int d = 0; d < Dk; d++) q[d] = source[d];
      if (basis == ROTATED) rotate(q, Dk);
      float score = 0.0f;
      if (basis == ROTATED && centre != nullptr)
        for (int d = 0; d < Dk; d++) score += source[d] * centre[d];
      query.centre[r] = score * a.scale;
      quantise_query(query, r, Dk);
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
