// Runs the portable kernels without Python: writes caches of every codec, prints a hash of their bytes, and compares
// attention with dense attention in double over the decoded cache. One line a case:
//   K V head_dim block_size  hash of the blocks  largest error
// Ends with 1 if an error exceeds LIMIT, and names the case. test_arm.py builds it for 64-bit ARM and for this
// machine; hashes must be equal.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "kernels.h"

extern "C" {
int32_t kvtune_find_isa(const char* name);
int32_t kvtune_write(const KvWrite*, int32_t isa);
int32_t kvtune_attention(const KvAttention*, int32_t isa);
int32_t kvtune_gather(const KvGather*, int32_t isa);
}

namespace {

constexpr double LIMIT = 2e-5;
constexpr int KV_HEADS = 2, GROUP_HEADS = 4, HEADS = KV_HEADS * GROUP_HEADS;
const char* const NAMES[] = {"fp32", "bf16", "fp16", "int8", "int4", "fp8", "int4_rh", "n8_rh", "n4_rh"};
// Two sequences begin with the same blocks; one has a single token.
constexpr int NUM_SEQS = 4, LENGTHS[NUM_SEQS] = {700, 1100, 1, 77}, ROWS[NUM_SEQS] = {1, 3, 1, 40};
constexpr int SHARED_TOKENS = 528;

// Sums of four uniform numbers of 16 bits, about -2..2: the same floats everywhere.
struct Random {
  uint32_t state;
  float operator()() {
    int sum = -2 * 65536;
    for (int i = 0; i < 4; i++) {
      state = state * 1664525u + 1013904223u;
      sum += static_cast<int>(state >> 16);
    }
    return static_cast<float>(sum) / 65536.0f;
  }
};

int bits_of(int codec) { return codec == KV_FP32 ? 32 : codec <= KV_FP16 ? 16 : codec == KV_INT8 || codec == KV_FP8 ? 8 : 4; }
int values_of(int codec) { return codec < KV_INT8 ? 0 : codec == KV_INT8 || codec == KV_FP8 ? 1 : 2; }

struct Case {
  int dim, block_size;
  KvCache cache{};
  std::vector<uint8_t> arena, low[2];
  std::vector<int32_t> rows_of_low, table;
  int width, num_blocks;
};

int64_t lay_out(KvSide& side, int codec, const Case& c, int64_t at) {
  side = {codec, c.dim, at, 0, nullptr, nullptr, 0, nullptr, 0};
  side.strip_offset = at + static_cast<int64_t>(KV_HEADS) * c.block_size * c.dim * bits_of(codec) / 8;
  return side.strip_offset + static_cast<int64_t>(KV_HEADS) * c.block_size * values_of(codec) * 2;
}

Case make_case(int k_codec, int v_codec, int dim, int block_size) {
  Case c;
  c.dim = dim, c.block_size = block_size;
  c.width = (1100 + block_size - 1) / block_size;
  c.num_blocks = NUM_SEQS * c.width;
  c.cache.block_size = block_size, c.cache.num_kv_heads = KV_HEADS;
  KvArena& body = c.cache.body;
  const int64_t bytes = (lay_out(body.v, v_codec, c, lay_out(body.k, k_codec, c, 0)) + 63) / 64 * 64;
  c.arena.assign(static_cast<size_t>(bytes * c.num_blocks), 0xff);
  body.data = c.arena.data(), body.num_blocks = c.num_blocks, body.block_bytes = bytes;
  for (int b = 0; b < c.num_blocks; b++) c.rows_of_low.push_back(b);
  for (int side = 0; side < 2; side++) {
    KvSide& s = side == 0 ? body.k : body.v;
    if (s.codec != KV_N8_RH) continue;
    s.low_bytes = static_cast<int64_t>(KV_HEADS) * block_size * dim / 2;
    c.low[side].assign(static_cast<size_t>(s.low_bytes * c.num_blocks), 0xff);
    s.low = c.low[side].data(), s.low_row = c.rows_of_low.data(), s.num_low_rows = c.num_blocks;
  }
  for (int i = 0; i < c.num_blocks; i++) c.table.push_back(i * 11 % c.num_blocks);  // 11 divides none of them: shuffled
  for (int b = 0; b < SHARED_TOKENS / block_size; b++) c.table[static_cast<size_t>(c.width + b)] = c.table[static_cast<size_t>(b)];
  return c;
}

int write(const Case& c, int isa) {
  int status = 0;
  for (int s = 0; s < NUM_SEQS; s++) {
    std::vector<float> k(static_cast<size_t>(LENGTHS[s] * KV_HEADS * c.dim)), v(k.size());
    std::vector<int64_t> slots;
    Random random{static_cast<uint32_t>(s + 1)};
    for (float& x : k) x = random();
    for (float& x : v) x = random();
    for (int t = 0; t < LENGTHS[s]; t++) {
      const int64_t block = c.table[static_cast<size_t>(s * c.width + t / c.block_size)];
      slots.push_back(s == 1 && t < SHARED_TOKENS / c.block_size * c.block_size ? -1 : block * c.block_size + t % c.block_size);
    }
    const int64_t stride = KV_HEADS * c.dim;
    const KvWrite args{&c.cache, {k.data(), stride, c.dim, 0}, {v.data(), stride, c.dim, 0}, slots.data(), LENGTHS[s], 1};
    status |= kvtune_write(&args, isa);
  }
  return status;
}

uint64_t hash_of(const Case& c) {
  uint64_t hash = 1469598103934665603u;
  for (const std::vector<uint8_t>* bytes : {&c.arena, &c.low[0], &c.low[1]})
    for (uint8_t byte : *bytes) hash = (hash ^ byte) * 1099511628211u;
  return hash;
}

// Largest difference to dense attention of one query row and head.
double error_of(const Case& c, const float* q, const float* out, const float* k, const float* v, int head, int keys) {
  std::vector<double> weights;
  double top = -1e30, total = 0, worst = 0;
  for (int t = 0; t < keys; t++) {
    double score = 0;
    for (int d = 0; d < c.dim; d++) score += static_cast<double>(q[d]) * k[(t * KV_HEADS + head) * c.dim + d];
    weights.push_back(score / std::sqrt(static_cast<double>(c.dim)));
    top = std::max(top, weights.back());
  }
  for (double& w : weights) total += w = std::exp(w - top);
  for (int d = 0; d < c.dim; d++) {
    double expected = 0;
    for (int t = 0; t < keys; t++) expected += weights[static_cast<size_t>(t)] * v[(t * KV_HEADS + head) * c.dim + d];
    const double error = std::fabs(expected / total - out[d]);
    worst = error <= worst ? worst : error;  // NaN counts
  }
  return worst;
}

double compare(const Case& c, int isa, int& status) {
  std::vector<int32_t> starts{0}, lengths(LENGTHS, LENGTHS + NUM_SEQS);
  for (int rows : ROWS) starts.push_back(starts.back() + rows);
  const size_t row_size = static_cast<size_t>(HEADS * c.dim), size = static_cast<size_t>(starts.back()) * row_size;
  std::vector<float> q(size), out(size);
  Random random{99};
  for (float& x : q) x = random();
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  const KvAttention args{&c.cache, {q.data(), HEADS * c.dim, c.dim, 0}, out.data(), nullptr, starts.data(),
                         lengths.data(), c.table.data(), nullptr, c.width, starts.back(), NUM_SEQS, HEADS, 0, scale,
                         0.0f, 2};
  status |= kvtune_attention(&args, isa);
  double worst = 0;
  for (int s = 0; s < NUM_SEQS; s++) {
    std::vector<float> k(static_cast<size_t>(LENGTHS[s] * KV_HEADS * c.dim)), v(k.size());
    const KvGather gather{&c.cache, c.table.data() + s * c.width, k.data(), v.data(), LENGTHS[s], 1};
    status |= kvtune_gather(&gather, isa);
    for (int i = 0; i < ROWS[s]; i++)
      for (int h = 0; h < HEADS; h++) {
        const size_t at = static_cast<size_t>(starts[static_cast<size_t>(s)] + i) * row_size + static_cast<size_t>(h * c.dim);
        const double error = error_of(c, &q[at], &out[at], k.data(), v.data(), h / GROUP_HEADS, LENGTHS[s] - ROWS[s] + i + 1);
        worst = error <= worst ? worst : error;
      }
  }
  return worst;
}

int run(int k_codec, int v_codec, int dim, int block_size, int isa) {
  const Case c = make_case(k_codec, v_codec, dim, block_size);
  int status = write(c, isa);
  const double error = compare(c, isa, status);
  std::printf("%s %s %d %d %016llx %.2e\n", NAMES[k_codec], NAMES[v_codec], dim, block_size,
              static_cast<unsigned long long>(hash_of(c)), error);
  if (status == 0 && error <= LIMIT) return 0;
  std::fprintf(stderr, "%s/%s, head dim %d, blocks of %d: status %d, error %g\n", NAMES[k_codec], NAMES[v_codec], dim,
               block_size, status, error);
  return 1;
}

}  // namespace

int main() {
  const int isa = kvtune_find_isa("portable");
  int failed = 0;
  for (int codec = KV_FP32; codec <= KV_N4_RH; codec++) failed |= run(codec, codec, 64, 16, isa);
  failed |= run(KV_INT8, KV_INT4, 80, 48, isa) | run(KV_INT4_RH, KV_N8_RH, 72, 16, isa);
  failed |= run(KV_BF16, KV_FP8, 128, 32, isa) | run(KV_INT8, KV_INT8, 96, 128, isa);
  return failed;
}
