// 32-byte names of blocks.
#pragma once

#include <cstdint>
#include <cstring>

#include "../lazy_array.h"

namespace kvtune::pool {

// A SHA-256 of a block and all before it, or another unique name, zeros behind it.
struct Digest {
  uint64_t words[4];

  bool operator==(const Digest& other) const { return std::memcmp(words, other.words, sizeof(words)) == 0; }

  // Well mixed whatever the name is made of: both halves of products of its words (Wang 2019, wyhash).
  uint64_t mixed() const {
    return folded(words[0] ^ 0x9e3779b97f4a7c15, words[1] ^ 0xc2b2ae3d27d4eb4f) +
           folded(words[2] ^ 0x165667b19e3779f9, words[3] ^ 0xff51afd7ed558ccd);
  }

 private:
  static uint64_t folded(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
};
static_assert(sizeof(Digest) == 32);

// Brings the line of an address that will be read. The empty statement is for GCC: it drops calls of functions that
// do nothing else, as if they had no effect.
inline void fetch(const void* address) {
  __builtin_prefetch(address);
  asm volatile("");
}

// 0..size-1, evenly (Lemire 2019).
inline int64_t place_of(uint64_t mixed, int64_t size) {
  return static_cast<int64_t>(static_cast<unsigned __int128>(mixed) * static_cast<uint64_t>(size) >> 64);
}

}  // namespace kvtune::pool
