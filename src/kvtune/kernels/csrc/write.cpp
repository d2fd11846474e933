// Encoding and decoding for the instruction set KVTUNE_ISA; compiled once for each, without contraction.
#include "kernels.h"

namespace kvtune::KVTUNE_ISA {
namespace {
#include "vec.h"

#include "write.h"
}  // namespace

const WriteTable write_table = {write_head, gather_block};
}  // namespace kvtune::KVTUNE_ISA
