// Records shared by the C ABI (api.cpp), the per-ISA code and ctypes (native.py mirrors them field by field).
//
// Layout of a block: see PackedLayout in kvtune/spec.py, which is the definition.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Order is part of the ABI: native.py numbers codecs the same way.
enum KvCodec : int32_t {
  KV_FP32 = 0, KV_BF16 = 1, KV_FP16 = 2, KV_INT8 = 3, KV_INT4 = 4, KV_FP8 = 5, KV_INT4_RH = 6, KV_N8_RH = 7, KV_N4_RH = 8
};

enum KvStatus : int32_t { KV_OK = 0, KV_BAD_BLOCK = 1, KV_BAD_ARGUMENT = 2, KV_NO_MEMORY = 3 };

// One side (K or V) of one arena's blocks; offsets in bytes from the start of a block.
struct KvSide {
  int32_t codec;
  int32_t head_dim;
  int64_t codes_offset;
  int64_t strip_offset;
  const float* centre;     // [h, head_dim] subtracted before rotating, or null (rotated codecs alone)
  uint8_t* low;            // rows of low planes (KV_N8_RH), or null: read the high plane alone
  int64_t low_bytes;       // of one row
  const int32_t* low_row;  // block -> row, -1 where the plane was dropped
  int64_t num_low_rows;
};

struct KvArena {
  uint8_t* data;
  int64_t num_blocks;
  int64_t block_bytes;
  KvSide k;
  KvSide v;
};

// Block ids 0..body.num_blocks-1 are the body's, the following first.num_blocks ids the first arena's.
struct KvCache {
  int32_t block_size;
  int32_t num_kv_heads;
  KvArena body;
  KvArena first;
};

// Rows [n, heads, dim] of float or, where `is_bf16`, bf16; strides in elements, dims beside each other.
struct KvRows {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
  int32_t is_bf16;
};

struct KvWrite {
  const KvCache* cache;
  KvRows k;  // [num_tokens, h, Dk]
  KvRows v;  // [num_tokens, h, Dv]
  const int64_t* slots;
  int64_t num_tokens;
  int32_t num_threads;
};

struct KvAttention {
  const KvCache* cache;
  KvRows q;        // [rows, H, Dk]; if bf16, products with bf16 keys and values may be of bf16 with bf16
  void* out;       // [rows, H, Dv], contiguous, of q's type
  float* lse;      // [rows, H] log-sum-exp, sink included, or null
  const int32_t* query_start;
  const int32_t* context_len;
  const int32_t* block_table;
  const float* sinks;  // [H] or null
  int64_t table_stride;  // blocks per row of the block table
  int64_t num_rows;      // of q; those beyond query_start[num_seqs] are padding and become 0
  int32_t num_seqs;
  int32_t num_heads;
  int32_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
  int32_t num_threads;
};

struct KvGather {
  const KvCache* cache;
  const int32_t* block_ids;
  float* k;  // [num_tokens, h, Dk]
  float* v;  // [num_tokens, h, Dv]
  int64_t num_tokens;
  int32_t num_threads;
};

}  // extern "C"

namespace kvtune {

constexpr int MAX_DIM = 512;   // largest head dim
constexpr int MAX_ROWS = 8;    // query rows of one KV head computed together
constexpr int MAX_BANDS = 8;   // sets of MAX_ROWS that share one pass over the keys
constexpr int PANEL_BANDS = 3; // from here on key tiles are unpacked once for all bands
constexpr int QUERY_TILE = MAX_ROWS * MAX_BANDS;
constexpr int GROUP = 16;      // tokens side by side in the packed layout
constexpr int TILE = 64;       // keys of one online-softmax step, at fixed absolute positions
constexpr int SPLIT = 1024;    // keys reduced by themselves before merging: results do not depend on threads
constexpr int WAVE = 32;       // (task, split) pairs per thread whose results are kept before they are merged

// One row of queries of a KV head: row `row` of q, head `member` of those that share the KV head.
struct QueryRow {
  int32_t row;
  int32_t member;
  int32_t position;
};

// Up to QUERY_TILE query rows of one KV head, in order of their positions, and the keys [first_key, stop_key) of
// `seq` they pass over, of which each sees its own. `state`: where rows that hand over leave what they have reached
// for those of another task, which begins with it; null where rows begin anew and end.
struct Task {
  int32_t seq;
  int32_t kv_head;
  int32_t num_rows;
  int32_t first_key;
  int32_t stop_key;
  const QueryRow* rows;
  float* state;  // state_size of each row
  bool hands_over;
};

constexpr int num_bands(const Task& t) { return (t.num_rows + MAX_ROWS - 1) / MAX_ROWS; }
constexpr int band_rows(const Task& t, int band) {
  return t.num_rows - band * MAX_ROWS < MAX_ROWS ? t.num_rows - band * MAX_ROWS : MAX_ROWS;
}

// Whether a task's rows begin, or end, in the middle of a split.
constexpr bool begins_open(const Task& t, int split) {
  return t.state != nullptr && !t.hands_over && t.first_key > split * SPLIT;
}
constexpr bool ends_open(const Task& t, int split) { return t.hands_over && t.stop_key < (split + 1) * SPLIT; }

// Running softmax state of the rows of a band.
struct Partial {
  float maximum[MAX_ROWS];
  float total[MAX_ROWS];
  alignas(64) float acc[MAX_ROWS * MAX_DIM];
};

// Keys and values lie in the model's own basis, or rotated by Hadamard blocks.
enum Basis { PLAIN = 0, ROTATED = 1, NUM_BASES = 2 };

// The query rows of a band in one basis: in float, in 16-bit fixed point (256 x high + low) x step, and in bf16
// where they came so.
struct Query {
  alignas(64) float q[MAX_ROWS * MAX_DIM];
  alignas(64) int8_t high[MAX_ROWS * MAX_DIM];
  alignas(64) int8_t low[MAX_ROWS * MAX_DIM];
  alignas(64) uint16_t bf16[MAX_ROWS * MAX_DIM];
  int32_t bytes_sum[MAX_ROWS];  // sum of 256 x high + low
  float step[MAX_ROWS];
  float sum[MAX_ROWS];
  float centre[MAX_ROWS];  // score of the centre that encoding took from every key
};

// Up to MAX_ROWS rows of a task: what they ask and what they have seen of the present split.
struct Band {
  Query query[NUM_BASES];  // those the cache has keys in
  alignas(64) float total_lanes[MAX_ROWS * GROUP];  // the softmax sum, lane by lane until the split ends
  alignas(64) float shift_lanes[NUM_BASES][MAX_ROWS * GROUP];  // sum of weight x offset of V, the same way
  alignas(64) float rotated_acc[MAX_ROWS * MAX_DIM];           // of values in the rotated basis, until the split ends
  int32_t position[MAX_ROWS];
  int32_t num_rows;  // computed; in a task of PANEL_BANDS all, the rows beyond the task's repeat its last
  Partial split;
  Partial running;
};

// Scratch of one thread.
struct Work {
  alignas(64) float scores[MAX_ROWS * TILE];
  alignas(64) float weights[MAX_ROWS * TILE];
  alignas(64) int8_t w_high[MAX_ROWS * TILE];
  alignas(64) int8_t w_low[MAX_ROWS * TILE];
  alignas(64) uint16_t w_bf16[MAX_ROWS * TILE];
  alignas(64) uint8_t v_tail[GROUP * MAX_DIM * 4];
  alignas(64) uint8_t k_panel[TILE * MAX_DIM * 4];
  alignas(64) uint8_t v_panel[TILE * MAX_DIM * 4];
  bool has_values[NUM_BASES];
  Band band[MAX_BANDS];
};

// Floats of a row's state: of the parts merged so far maximum, total and values; of the part at hand maximum, the
// lanes of total and shifts, values in both bases.
constexpr int state_size(int dim) { return 2 + dim + 1 + GROUP + NUM_BASES * GROUP + 2 * dim; }

// What one instruction set offers; the tables live in attention.cpp and write.cpp, compiled once for each.
struct AttentionTable {
  // Reduce the task's rows over its keys of [split * SPLIT, ...) into each band's `split`; begins and ends with the
  // task's state where the task's keys do inside. Returns a KvStatus.
  int (*attend_split)(const KvAttention&, const Task&, int split, Work&);
  // Load the task's query rows into the bands.
  void (*load_queries)(const KvAttention&, const Task&, Work&);
  // running <- running merged with part, by log-sum-exp.
  void (*merge)(const Partial& part, Partial& running, int rows, int dim);
  // Of one band: apply sinks, normalise, store out and lse.
  void (*finish)(const KvAttention&, const Task&, int band, const Partial&);
  // Whether integer codes are multiplied as they are; else they are decoded to floats first.
  bool has_byte_products;
};

struct WriteTable {
  // Encode one KV head of K (side 0) or V (side 1) of all tokens. Returns a KvStatus.
  int (*write_head)(const KvWrite&, int kv_head, int side);
  // Decode one block of a KvGather. Returns a KvStatus.
  int (*gather_block)(const KvGather&, int64_t index);
};

#define KV_DECLARE_ISA(NAME)                      \
  namespace NAME {                                \
  extern const AttentionTable attention_table;    \
  extern const WriteTable write_table;            \
  }
KV_DECLARE_ISA(portable)
#ifdef KVTUNE_X86
KV_DECLARE_ISA(avx2)
KV_DECLARE_ISA(avx512)
#ifdef KVTUNE_BF16
KV_DECLARE_ISA(avx512_bf16)
#endif
#endif

}  // namespace kvtune
