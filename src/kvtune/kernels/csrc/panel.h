// Key tiles unpacked once for many query rows. Included in the namespace of one instruction set, after values.h.
//
// A panel has the stored order with other elements: 16 tokens (K) or `dim` dims (V) side by side, each 4 bytes:
// 4 codes where products are of bytes, else one float.

// Vector J of those that a vector of words becomes.
template <int FORM, int J> KV_INLINE VU unpacked(VU word, VU low) {
#ifdef KV_VNNI
  if constexpr (is_integer(FORM)) return code_bytes<FORM>(word, low, J);
  else
#endif
    return (VU)Elements<FORM>::template get<J>(word, low);
}

// `rows` rows of `width` words of one form -> rows x (elements of a word / elements of a panel's word).
template <int FORM>
static void unpack_rows(const uint8_t* words, const uint8_t* low, const uint8_t* next, int rows, int width,
                        uint8_t* out) {
  constexpr int E = Elements<FORM>::count, PARTS = E / Elements<FORM | PANEL>::count;
  for (int row = 0; row < rows; row++, words += width * 4, next += width * 4) {
    int c = 0;
    for (; c + WIDTH <= width; c += WIDTH) {
      const VU word = load<VU>(words + c * 4);
      VU below{};
      if constexpr (FORM == KV_N8_RH) below = load<VU>(low + (row * width + c) * 4);
      __builtin_prefetch(next + c * 4);
      uint8_t* at = out + (row * PARTS * width + c) * 4;
#define KV_STEP(J) \
  if constexpr (J < PARTS) store(at + J * width * 4, unpacked<FORM, J>(word, below));
      KV_STEP(0) KV_STEP(1) KV_STEP(2) KV_STEP(3) KV_STEP(4) KV_STEP(5) KV_STEP(6) KV_STEP(7)
#undef KV_STEP
    }
    for (; c < width; c++)
      for (int j = 0; j < E; j++) {
        const uint8_t* word = words + c * 4;
        const uint8_t* below = FORM == KV_N8_RH ? low + (row * width + c) * 4 : nullptr;
        const float x = element_at(FORM, word, below, j);
        uint8_t* at = out + (row * PARTS * width + c) * 4;
        if (has_byte_products && is_integer(FORM))
          at[j / 4 * width * 4 + j % 4] = static_cast<uint8_t>(static_cast<int>(x) + offset_of_codes(FORM));
        else
          __builtin_memcpy(at + j * width * 4, &x, 4);
      }
  }
}

KV_INLINE void fetch(const uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

using UnpackKernel = void (*)(const uint8_t*, const uint8_t*, const uint8_t*, int, int, uint8_t*);
static const UnpackKernel unpack_kernels[NUM_FORMS] = {
    nullptr, nullptr, unpack_rows<KV_FP16>, has_byte_products ? nullptr : unpack_rows<KV_INT8>,
    unpack_rows<KV_INT4>, unpack_rows<KV_FP8>, unpack_rows<KV_N8_RH>, unpack_rows<KV_N4_RH>, nullptr};

// Turn one side of a group into its panel form: `words` of `rows` x `width` now lie in `panel`, if they had to move.
KV_INLINE void unpack_side(const uint8_t*& words, const uint8_t* low, const uint8_t* next, int& form, int elements,
                           int width, uint8_t* panel) {
  const UnpackKernel unpack = unpack_kernels[form_index(form)];
  const int rows = elements / elements_per_word(form == BF16_DOT ? static_cast<int>(KV_BF16) : form);
  form |= PANEL;
  if (unpack == nullptr) return fetch(next, static_cast<int64_t>(rows) * width * 4);
  unpack(words, low, next, rows, width, panel);
  words = panel;
}

// The groups [at, stop) of a tile in panel form.
static void unpack_tile(TokenGroup* groups, int at, int stop, int Dk, int Dv, Work& work) {
  for (int g = at; g < stop; g++) {
    TokenGroup& group = groups[g];
    unpack_side(group.k, group.k_low, group.next_k, group.k_form, Dk, GROUP, work.k_panel + g * GROUP * Dk * 4);
    unpack_side(group.v, group.v_low, group.next_v, group.v_form, GROUP, Dv, work.v_panel + g * GROUP * Dv * 4);
  }
}
