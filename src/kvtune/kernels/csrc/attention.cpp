// Attention for the instruction set KVTUNE_ISA (portable, avx2, avx512 or avx512_bf16); compiled once for each.
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define KV_VNNI 1
#if defined(__AVX512BF16__)
#define KV_BF16_DOT 1
#endif
#endif
#include "kernels.h"

namespace kvtune::KVTUNE_ISA {
namespace {
#include "vec.h"

#include "tiles.h"

#include "values.h"

#include "panel.h"

#include "attention.h"
}  // namespace

const AttentionTable attention_table = {attend_split, load_queries, merge, finish, has_byte_products};
}  // namespace kvtune::KVTUNE_ISA
