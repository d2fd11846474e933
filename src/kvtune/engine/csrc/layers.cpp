// What a decoder layer does between its matrix products, in one pass over memory each: residual and norm,
// splitting and rotating queries and keys, the gated activation. Rows are independent of each other and sums
// have one fixed order: a row's bits depend neither on its neighbours nor on threads nor on the instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../kernels/csrc/pool.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY_ISAS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MANY_ISAS
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int32_t ABI_VERSION = 2;
constexpr int LANES = 16;
constexpr int64_t ROW_ELEMENTS = 1 << 15;  // work worth waking a thread for

enum Dtype : int32_t { FP32 = 0, BF16 = 1 };

INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

INLINE float get(const float* p, int64_t i) { return p[i]; }
INLINE float get(const uint16_t* p, int64_t i) { return bits_to_float(static_cast<uint32_t>(p[i]) << 16); }
INLINE void put(float* p, int64_t i, float x) { p[i] = x; }
INLINE void put(uint16_t* p, int64_t i, float x) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// e^x (Cephes), relative error below 2e-7; 0 below -87, infinity above 88.7, NaN for NaN.
INLINE float exp_of(float x) {
  const float n = x * 1.44269504f + 12582912.0f;
  const float whole = n - 12582912.0f;
  float r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float y = bits_to_float(float_to_bits(p) + ((float_to_bits(n) - 0x4b400000u) << 23));
  const float bounded = x > 88.3f ? INFINITY : y;
  return x < -87.0f ? 0.0f : (x == x ? bounded : x);
}

// 1 / sqrt(mean of squares + eps), summed in LANES strands that are added in order.
template <class T> INLINE float inverse_rms(const T* x, int64_t dim, float eps) {
  float strand[LANES] = {};
  const int64_t whole = dim - dim % LANES;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int j = 0; j < LANES; j++) {
      const float value = get(x, i + j);
      strand[j] += value * value;
    }
  for (int64_t i = whole; i < dim; i++) strand[i - whole] += get(x, i) * get(x, i);
  float total = 0.0f;
  for (int j = 0; j < LANES; j++) total += strand[j];
  return 1.0f / std::sqrt(total / static_cast<float>(dim) + eps);
}

template <class T> INLINE void add_row(T* residual, const T* delta, int64_t dim) {
  for (int64_t i = 0; i < dim; i++) put(residual, i, get(residual, i) + get(delta, i));
}

template <class T> INLINE void norm_row(const T* x, const T* weight, T* out, int64_t dim, float eps) {
  const float scale = inverse_rms(x, dim, eps);
  for (int64_t i = 0; i < dim; i++) put(out, i, get(x, i) * scale * get(weight, i));
}

struct AddNorm {
  void* residual;      // [rows, dim], delta is added in place
  const void* delta;   // [rows, dim] or null
  const void* weight;  // [dim]
  void* out;           // [rows, dim]
  int64_t dim;
  float eps;
};

template <class T> INLINE void add_norm(const AddNorm& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    T* x = static_cast<T*>(a.residual) + row * a.dim;
    if (a.delta != nullptr) add_row(x, static_cast<const T*>(a.delta) + row * a.dim, a.dim);
    norm_row(x, static_cast<const T*>(a.weight), static_cast<T*>(a.out) + row * a.dim, a.dim, a.eps);
  }
}
MANY_ISAS void add_norm_fp32(const AddNorm& a, int64_t begin, int64_t end) { add_norm<float>(a, begin, end); }
MANY_ISAS void add_norm_bf16(const AddNorm& a, int64_t begin, int64_t end) { add_norm<uint16_t>(a, begin, end); }

struct SplitRope {
  const void* qkv;  // [rows, (num_heads + 2 num_kv_heads) dim]
  const float* cos;  // [rows, dim], the first half of each row is read
  const float* sin;
  const void* q_weight;  // [dim] of a norm over each head before rotating, or null
  const void* k_weight;
  void* q;  // [rows, num_heads, dim]
  void* k;  // [rows, num_kv_heads, dim]
  void* v;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t dim;
  float eps;
};

template <class T>
INLINE void rotate_head(const T* x, const T* weight, const float* cos, const float* sin, T* out, int64_t dim, float eps) {
  const int64_t half = dim / 2;
  if (weight == nullptr) {
    for (int64_t i = 0; i < half; i++) {
      const float a = get(x, i), b = get(x, i + half);
      put(out, i, a * cos[i] - b * sin[i]);
      put(out, i + half, b * cos[i] + a * sin[i]);
    }
    return;
  }
  const float scale = inverse_rms(x, dim, eps);
  for (int64_t i = 0; i < half; i++) {
    const float a = get(x, i) * scale * get(weight, i), b = get(x, i + half) * scale * get(weight, i + half);
    put(out, i, a * cos[i] - b * sin[i]);
    put(out, i + half, b * cos[i] + a * sin[i]);
  }
}

template <class T> INLINE void split_rope(const SplitRope& a, int64_t begin, int64_t end) {
  const int64_t dim = a.dim, q_width = a.num_heads * dim, kv_width = a.num_kv_heads * dim;
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(a.qkv) + row * (q_width + 2 * kv_width);
    const float *cos = a.cos + row * dim, *sin = a.sin + row * dim;
    T* q = static_cast<T*>(a.q) + row * q_width;
    T* k = static_cast<T*>(a.k) + row * kv_width;
    for (int64_t h = 0; h < a.num_heads; h++)
      rotate_head(x + h * dim, static_cast<const T*>(a.q_weight), cos, sin, q + h * dim, dim, a.eps);
    for (int64_t h = 0; h < a.num_kv_heads; h++)
      rotate_head(x + q_width + h * dim, static_cast<const T*>(a.k_weight), cos, sin, k + h * dim, dim, a.eps);
    std::memcpy(static_cast<T*>(a.v) + row * kv_width, x + q_width + kv_width, sizeof(T) * kv_width);
  }
}
MANY_ISAS void split_rope_fp32(const SplitRope& a, int64_t begin, int64_t end) { split_rope<float>(a, begin, end); }
MANY_ISAS void split_rope_bf16(const SplitRope& a, int64_t begin, int64_t end) { split_rope<uint16_t>(a, begin, end); }

struct SiluMul {
  const void* gate_up;  // [rows, 2 dim]
  void* out;            // [rows, dim]
  int64_t dim;
};

template <class T> INLINE void silu_mul(const SiluMul& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.dim;
    const T* up = gate + a.dim;
    T* out = static_cast<T*>(a.out) + row * a.dim;
    for (int64_t i = 0; i < a.dim; i++) {
      const float x = get(gate, i);
      put(out, i, x / (1.0f + exp_of(-x)) * get(up, i));
    }
  }
}
MANY_ISAS void silu_mul_fp32(const SiluMul& a, int64_t begin, int64_t end) { silu_mul<float>(a, begin, end); }
MANY_ISAS void silu_mul_bf16(const SiluMul& a, int64_t begin, int64_t end) { silu_mul<uint16_t>(a, begin, end); }

template <class Args>
void over_rows(void (*body)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t width, int32_t threads) {
  const int64_t least = ROW_ELEMENTS / (width > 0 ? width : 1) + 1;  // rows of a part
  int64_t parts = rows / least;
  parts = parts < 1 ? 1 : (parts > threads ? threads : parts);
  if (parts == 1) return body(args, 0, rows);
  kvtune::ThreadPool::run(parts, threads, [&](int64_t i) { body(args, rows * i / parts, rows * (i + 1) / parts); });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t kvtune_layers_abi_version() { return ABI_VERSION; }

EXPORT void kvtune_layers_use_team(void* parallel) {
  kvtune::ThreadPool::use_team(reinterpret_cast<kvtune::ParallelFunction>(parallel));
}

EXPORT void kvtune_add_norm(void* residual, const void* delta, const void* weight, void* out, int64_t rows, int64_t dim,
                            float eps, int32_t dtype, int32_t threads) {
  const AddNorm args{residual, delta, weight, out, dim, eps};
  over_rows(dtype == BF16 ? add_norm_bf16 : add_norm_fp32, args, rows, dim, threads);
}

EXPORT void kvtune_split_rope(const void* qkv, const float* cos, const float* sin, const void* q_weight, const void* k_weight,
                              void* q, void* k, void* v, int64_t rows, int64_t num_heads, int64_t num_kv_heads, int64_t dim,
                              float eps, int32_t dtype, int32_t threads) {
  const SplitRope args{qkv, cos, sin, q_weight, k_weight, q, k, v, num_heads, num_kv_heads, dim, eps};
  over_rows(dtype == BF16 ? split_rope_bf16 : split_rope_fp32, args, rows, (num_heads + 2 * num_kv_heads) * dim, threads);
}

EXPORT void kvtune_silu_mul(const void* gate_up, void* out, int64_t rows, int64_t dim, int32_t dtype, int32_t threads) {
  const SiluMul args{gate_up, out, dim};
  over_rows(dtype == BF16 ? silu_mul_bf16 : silu_mul_fp32, args, rows, 2 * dim, threads);
}
