// SHA-256 (FIPS 180-4) of block hashes: by the CPU's own instructions where it has them, else in plain C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace kvtune::pool {

namespace sha {

alignas(16) inline constexpr uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

inline constexpr uint32_t FIRST_STATE[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

inline uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

inline uint32_t big_endian(const uint8_t* p) {
  return uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | uint32_t{p[3]};
}

// Takes `num` pieces of 64 bytes into the state.
inline void compress_portable(uint32_t* state, const uint8_t* data, size_t num) {
  for (; num > 0; --num, data += 64) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) w[i] = big_endian(data + 4 * i);
    for (int i = 16; i < 64; ++i) {
      const uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
      const uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; ++i) {
      const uint32_t t1 =
          h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + w[i];
      const uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const uint32_t added[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += added[i];
  }
}

#if defined(__x86_64__)
inline bool has_sha_instructions() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (b >> 29 & 1) != 0 && __builtin_cpu_supports("sse4.1");
}

// The state as ABEF and CDGH, as the SHA extensions take it.
struct StateX86 {
  __m128i abef, cdgh;
};

#define KVTUNE_SHA __attribute__((target("sha,sse4.1"), always_inline)) inline

KVTUNE_SHA StateX86 state_of(__m128i dcba, __m128i hgfe) {  // four words each, the first lowest
  const __m128i cdab = _mm_shuffle_epi32(dcba, 0xB1), efgh = _mm_shuffle_epi32(hgfe, 0x1B);
  return {_mm_alignr_epi8(cdab, efgh, 8), _mm_blend_epi16(efgh, cdab, 0xF0)};
}

KVTUNE_SHA void words_of(const StateX86& state, __m128i* dcba, __m128i* hgfe) {
  const __m128i feba = _mm_shuffle_epi32(state.abef, 0x1B), dchg = _mm_shuffle_epi32(state.cdgh, 0xB1);
  *dcba = _mm_blend_epi16(feba, dchg, 0xF0);
  *hgfe = _mm_alignr_epi8(dchg, feba, 8);
}

// Reverses the bytes of each word.
KVTUNE_SHA __m128i swapped(__m128i words) {
  return _mm_shuffle_epi8(words, _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203));
}

KVTUNE_SHA __m128i words_at(const uint8_t* data) {
  return swapped(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}

// One piece of 64 bytes, four words in each of `piece`; four rounds a step.
KVTUNE_SHA StateX86 rounds(const StateX86& before, const __m128i* piece) {
  __m128i abef = before.abef, cdgh = before.cdgh, w[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i < 4) {
      w[i] = piece[i];
    } else {
      const __m128i sum =
          _mm_add_epi32(_mm_sha256msg1_epu32(w[i - 4], w[i - 3]), _mm_alignr_epi8(w[i - 1], w[i - 2], 4));
      w[i] = _mm_sha256msg2_epu32(sum, w[i - 1]);
    }
    const __m128i round = _mm_add_epi32(w[i], _mm_load_si128(reinterpret_cast<const __m128i*>(K) + i));
    cdgh = _mm_sha256rnds2_epu32(cdgh, abef, round);
    abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(round, 0x0E));
  }
  return {_mm_add_epi32(abef, before.abef), _mm_add_epi32(cdgh, before.cdgh)};
}

__attribute__((target("sha,sse4.1"))) inline void compress_x86(uint32_t* state, const uint8_t* data, size_t num) {
  auto* words = reinterpret_cast<__m128i*>(state);
  StateX86 now = state_of(_mm_loadu_si128(words), _mm_loadu_si128(words + 1));
  for (; num > 0; --num, data += 64) {
    const __m128i piece[4] = {words_at(data), words_at(data + 16), words_at(data + 32), words_at(data + 48)};
    now = rounds(now, piece);
  }
  __m128i dcba, hgfe;
  words_of(now, &dcba, &hgfe);
  _mm_storeu_si128(words, dcba);
  _mm_storeu_si128(words + 1, hgfe);
}

// `hash_chain` of blocks of at least 32 bytes. What each block waits for is the one before it alone: that one stays in
// registers, and the pieces behind the first are laid out in `tail`, their ends padded, while it is computed.
__attribute__((target("sha,sse4.1"))) inline void hash_chain_x86(const uint8_t* parent, const uint8_t* data,
                                                                 size_t width, int64_t num, uint8_t* tail,
                                                                 size_t num_pieces, uint8_t* out) {
  const auto* first = reinterpret_cast<const __m128i*>(FIRST_STATE);
  const StateX86 start = state_of(_mm_loadu_si128(first), _mm_loadu_si128(first + 1));
  __m128i dcba = words_at(parent), hgfe = words_at(parent + 16);
  for (; num > 0; --num, data += width, out += 32) {
    std::memcpy(tail, data + 32, width - 32);
    const __m128i head[4] = {dcba, hgfe, words_at(data), words_at(data + 16)};
    StateX86 now = rounds(start, head);
    for (size_t i = 0; i + 1 < num_pieces; ++i) {
      const uint8_t* p = tail + 64 * i;
      const __m128i piece[4] = {words_at(p), words_at(p + 16), words_at(p + 32), words_at(p + 48)};
      now = rounds(now, piece);
    }
    words_of(now, &dcba, &hgfe);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), swapped(dcba));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out) + 1, swapped(hgfe));
  }
}

#undef KVTUNE_SHA
#endif

using Compress = void (*)(uint32_t*, const uint8_t*, size_t);

inline Compress best_compress() {
#if defined(__x86_64__)
  if (has_sha_instructions()) return compress_x86;
#endif
  return compress_portable;
}

}  // namespace sha

// out[i] = SHA-256(out[i - 1] || data[i * width .. (i + 1) * width]), `parent` before the first: 32 bytes each.
inline void hash_chain(sha::Compress compress, const uint8_t* parent, const uint8_t* data, size_t width,
                       int64_t num, uint8_t* out) {
  const size_t length = 32 + width, padded = (length + 9 + 63) / 64 * 64;
  std::vector<uint8_t> message(padded, 0);
  message[length] = 0x80;
  for (int i = 0; i < 8; ++i) message[padded - 1 - i] = static_cast<uint8_t>(uint64_t{length} * 8 >> 8 * i);
#if defined(__x86_64__)
  if (compress == sha::compress_x86 && width >= 32) {
    return sha::hash_chain_x86(parent, data, width, num, message.data() + 64, padded / 64, out);
  }
#endif
  for (int64_t n = 0; n < num; ++n, data += width, out += 32) {
    std::memcpy(message.data(), parent, 32);
    std::memcpy(message.data() + 32, data, width);
    uint32_t state[8];
    std::memcpy(state, sha::FIRST_STATE, sizeof(state));
    compress(state, message.data(), padded / 64);
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = __builtin_bswap32(state[i]);
      std::memcpy(out + 4 * i, &word, 4);
    }
    parent = out;
  }
}

}  // namespace kvtune::pool
