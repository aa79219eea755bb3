// AVX2 with FMA: every x86-64 server and nearly every laptop since 2013. A tile is two halves of eight rows.
#include "attention.h"
#include "dense.h"
#include "elementwise.h"
#include "lowbit.h"
#include "lowrank.h"
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <type_traits>
#include <utility>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace llama::avx2 {
namespace {

struct Pair {
  __m256i a, b;
};
struct FloatPair {
  __m256 a, b;
};
template <class F>
inline Pair both(Pair v, F&& f) { return {f(v.a), f(v.b)}; }
template <class F>
inline Pair both(Pair v, Pair w, F&& f) { return {f(v.a, w.a), f(v.b, w.b)}; }

struct Simd {
  using Bytes = Pair;
  using Ints = Pair;
  using Floats = FloatPair;
  static constexpr int max_rows = 4, max_tiles = 1, max_heads = 4, num_sums = 6;  // what 16 registers hold
  static constexpr int byte_offset = 0;

  static inline __m256i load_half(const uint8_t* at) { return _mm256_loadu_si256((const __m256i*)at); }
  static inline Bytes load(const uint8_t* at) { return {load_half(at), load_half(at + 32)}; }
  static inline Bytes low(Bytes v) {
    return both(v, [](__m256i h) { return _mm256_and_si256(h, _mm256_set1_epi8(15)); });
  }
  static inline Bytes high(Bytes v) {
    return low(both(v, [](__m256i h) { return _mm256_srli_epi16(h, 4); }));
  }
  template <int mask>  // codes | (plane >> shift & mask) << 4
  static inline LLAMA_INLINE Bytes merge(Bytes codes, Bytes plane, int shift) {
    return both(codes, plane, [shift](__m256i c, __m256i p) LLAMA_INLINE {
      __m256i moved = shift < 4 ? _mm256_slli_epi16(p, 4 - shift) : _mm256_srli_epi16(p, shift - 4);
      return _mm256_or_si256(c, _mm256_and_si256(moved, _mm256_set1_epi8(mask << 4)));
    });
  }
  static inline Bytes lookup(const int8_t* table, Bytes codes) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
    return both(codes, [t](__m256i c) { return _mm256_shuffle_epi8(t, c); });
  }

  static inline LLAMA_INLINE Ints all(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static inline Ints add(Ints a, Ints b) {
    return both(a, b, [](__m256i x, __m256i y) { return _mm256_add_epi32(x, y); });
  }
  static inline Ints mask(Ints v, int bits) {
    return both(v, [bits](__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi32(bits)); });
  }
  static inline Ints either(Ints a, Ints b) {
    return both(a, b, [](__m256i x, __m256i y) { return _mm256_or_si256(x, y); });
  }
  static inline Ints left(Ints v, int n) {
    return both(v, [n](__m256i x) { return _mm256_slli_epi32(x, n); });
  }
  static inline Ints right(Ints v, int n) {
    return both(v, [n](__m256i x) { return _mm256_srli_epi32(x, n); });
  }
  static inline Ints byte(Bytes v, int i) { return mask(right(v, 8 * i), 255); }
  static inline Ints signed_byte(Bytes v, int i) {
    return both(left(v, 24 - 8 * i), [](__m256i x) { return _mm256_srai_epi32(x, 24); });
  }
  static inline __m256i low_words(Ints v) {  // of each lane, in their order
    v = mask(v, 0xffff);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(v.a, v.b), 0xD8);  // packed 128-bit lanes: a0 b0 a1 b1
  }
  static inline __m128i low_bytes(Ints v) {
    const __m256i words = low_words(mask(v, 255));
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static inline __m128i half(const uint8_t* at) { return _mm_loadu_si64(at); }
  static inline Ints widen(const uint8_t* at) {
    return {_mm256_cvtepu8_epi32(half(at)), _mm256_cvtepu8_epi32(half(at + 8))};
  }
  static inline Ints widen_signed(const uint8_t* at) {
    return {_mm256_cvtepi8_epi32(half(at)), _mm256_cvtepi8_epi32(half(at + 8))};
  }
  template <class T>
  static inline __m256i four_bytes(const T* x) {  // as a float: gcc makes one instruction of that
    return _mm256_castps_si256(_mm256_broadcast_ss((const float*)x));
  }
  using Step = Pair;
  static inline Step step(Ints v) { return either(mask(v, 0xffff), left(v, 16)); }  // for both words of a lane

  // Sums of products with four activations, which lie as `store` puts them; `weights` is done once for all rows.
  //
  // Two products of a small code and an activation (up to 127) make 16 bits, and so do several such pairs: of `most`
  // operands. Where a whole step's values fit, it starts at what the offset takes away, and sums on the way may wrap
  // around. Where they do not, the group is one step, and its sum starts there.
  template <int highest, int offset, int columns>
  struct CodeSum {
    using Code = int8_t;
    using Weights = Bytes;
    static constexpr int largest = offset > highest - offset ? offset : highest - offset;
    static constexpr bool fits = columns / 2 * 127 * largest <= 32767;
    static constexpr int most = fits ? columns / 4 : 32767 / (2 * 127 * highest);
    static_assert(columns / 4 % most == 0);
    Pair value, pairs;

    static inline LLAMA_INLINE Bytes weights(Bytes codes) { return codes; }
    static inline void store(Code* at, Ints v) { _mm_storeu_si128((__m128i*)at, low_bytes(v)); }
    static int32_t start(int32_t first, int32_t last) {
      return fits ? (first & 0xffff) | (int32_t)((uint32_t)last << 16) : first + last;
    }
    inline LLAMA_INLINE void clear() { value = pairs = all(0); }
    inline LLAMA_INLINE void open(int32_t start) {
      if constexpr (offset != 0) (fits ? pairs : value) = all(start);
    }
    inline LLAMA_INLINE void add(const Bytes& weights, const Code* x) {
      const __m256i v = four_bytes(x);
      pairs.a = _mm256_add_epi16(pairs.a, _mm256_maddubs_epi16(weights.a, v));
      pairs.b = _mm256_add_epi16(pairs.b, _mm256_maddubs_epi16(weights.b, v));
    }
    inline LLAMA_INLINE void close() { close({_mm256_set1_epi16(1), _mm256_set1_epi16(1)}); }
    inline LLAMA_INLINE void close(const Step& step) {
      value.a = _mm256_add_epi32(value.a, _mm256_madd_epi16(pairs.a, step.a));
      value.b = _mm256_add_epi32(value.b, _mm256_madd_epi16(pairs.b, step.b));
      pairs = all(0);
    }
  };
  // Signed weights are multiplied in 16 bits: of a lane's four columns 0 and 2 in one register, 1 and 3 in another.
  template <int columns>
  struct WordSum {
    using Code = int16_t;
    static constexpr int most = columns / 4;
    struct Weights {
      Pair even, odd;
    };
    Pair value;

    static inline void store(Code* at, Ints v) {
      constexpr int order = _MM_SHUFFLE(3, 1, 2, 0);
      const __m256i words = low_words(v);
      _mm256_storeu_si256((__m256i*)at, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, order), order));
    }
    static int32_t start(int32_t, int32_t) { return 0; }
    inline LLAMA_INLINE void clear() { value = all(0); }
    inline LLAMA_INLINE void open(int32_t) {}
    inline LLAMA_INLINE void add(const Weights& weights, const Code* x) {
      add(weights.even, four_bytes(x));
      add(weights.odd, four_bytes(x + 2));
    }
    inline LLAMA_INLINE void add(const Pair& weights, __m256i x) {
      value.a = _mm256_add_epi32(value.a, _mm256_madd_epi16(weights.a, x));
      value.b = _mm256_add_epi32(value.b, _mm256_madd_epi16(weights.b, x));
    }
    inline LLAMA_INLINE void close() {}
  };
  template <int columns>
  struct ByteSum : WordSum<columns> {
    static inline LLAMA_INLINE typename WordSum<columns>::Weights weights(Bytes v) {
      return {both(v, [](__m256i w) { return _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8); }),
              both(v, [](__m256i w) { return _mm256_srai_epi16(w, 8); })};
    }
  };
  struct LevelSum : WordSum<64> {
    static constexpr Levels levels = nf4_levels<false>();

    static inline LLAMA_INLINE Weights weights(Bytes codes) {
      const __m256i odd = _mm256_set1_epi16((int16_t)0xff00);  // of each word's bytes
      const Bytes high = lookup(levels.high, codes), low = lookup(levels.low, codes);
      return {both(high, low, [odd](__m256i h, __m256i l) {
                return _mm256_blendv_epi8(l, _mm256_slli_epi16(h, 8), odd);
              }),
              both(high, low, [odd](__m256i h, __m256i l) {
                return _mm256_blendv_epi8(_mm256_srli_epi16(l, 8), h, odd);
              })};
    }
  };

  static inline Floats all(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static inline Floats to_float(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
  static inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
  }
  static inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
  static inline Floats maximum(Floats a, Floats b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
  static inline Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
  static inline Floats swap_neighbours(Floats v) {
    return {_mm256_permute_ps(v.a, 0xB1), _mm256_permute_ps(v.b, 0xB1)};
  }
  static inline Floats negative_magnitude(Floats v) {
    return {_mm256_or_ps(v.a, _mm256_set1_ps(-0.0f)), _mm256_or_ps(v.b, _mm256_set1_ps(-0.0f))};
  }
  static inline Floats where_negative(Floats v, Floats a, Floats b) {
    return {_mm256_blendv_ps(b.a, a.a, v.a), _mm256_blendv_ps(b.b, a.b, v.b)};
  }
  using Register = __m256;  // half of a `Floats`
  static constexpr int lanes = 8;
  static inline Register zero() { return _mm256_setzero_ps(); }
  static inline Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static inline Register load_register(const float* at) { return _mm256_loadu_ps(at); }
  static inline Register load_register(const uint16_t* at) {  // bfloat16
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  }
  static inline Register load_register(const int8_t* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half((const uint8_t*)at)));
  }
  static inline float sum(Register v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  template <int count>  // sums, each in the order of `sum`; what stands at `at` behind them is written over
  static inline LLAMA_INLINE void store_sums(float* at, const Register* v) {
    const auto halves = [](__m256 x, __m256 y) LLAMA_INLINE {
      return _mm256_add_ps(_mm256_blend_ps(x, y, 0xF0), _mm256_permute2f128_ps(x, y, 0x21));
    };
    const __m256 x = halves(v[0], v[2]), y = halves(v[1], v[3]);
    const __m256 two = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xEE));
    const __m256 one = _mm256_add_ps(two, _mm256_movehdup_ps(two));  // 0 and 1 in lanes 0 and 2, 2 and 3 in 4 and 6
    _mm_storeu_ps(at, _mm_shuffle_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1), 0x88));
  }
  static inline float sum(Floats v) { return sum(_mm256_add_ps(v.a, v.b)); }
  static inline Ints round(Floats v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
  static inline Floats floats_of(Ints v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
  static inline Floats times_power_of_two(Floats v, Ints n) {
    return floats_of(add(Ints{_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}, left(n, 23)));
  }
  static inline Floats numbers(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
  static inline Floats numbers(const uint16_t* at) {  // bfloat16
    const auto* halves = (const __m128i*)at;
    return floats_of(left({_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)),
                           _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))}, 16));
  }
  static inline Floats numbers(const int8_t* at) { return to_float(widen_signed((const uint8_t*)at)); }
  static inline Floats floats(const uint8_t* at) {
    return {_mm256_loadu_ps((const float*)at), _mm256_loadu_ps((const float*)at + 8)};
  }
  static inline Floats halves(const uint8_t* at) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(at + 16)))};
  }
  static inline void store(float* at, Floats v) {
    _mm256_storeu_ps(at, v.a);
    _mm256_storeu_ps(at + 8, v.b);
  }
  static inline void store(uint16_t* at, Floats v) {  // bfloat16, rounded to even
    Ints bits = {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)};
    bits = right(add(bits, add(mask(right(bits, 16), 1), all(0x7fff))), 16);
    _mm256_storeu_si256((__m256i*)at, low_words(bits));
  }
};

#include "rounding_kernels.h"
#include "lowbit_kernels.h"
#include "attention_kernels.h"
#include "elementwise_kernels.h"
#include "lowrank_kernels.h"
#include "dense_kernels.h"

}  // namespace
std::span<const NamedKernel> kernels() { return lowbit_kernels(); }
AttentionKernels attention() { return kAttention; }
template <class T>
ElementwiseKernels<T> elementwise() { return elementwise_kernels<T>(); }
template ElementwiseKernels<float> elementwise();
template ElementwiseKernels<uint16_t> elementwise();
template <class T>
LowRankKernels<T> low_rank() { return low_rank_kernels<T>(); }
template LowRankKernels<float> low_rank();
template LowRankKernels<uint16_t> low_rank();
template <class T>
DenseKernel<T> dense() { return dense_product<T>; }
template DenseKernel<float> dense();
template DenseKernel<uint16_t> dense();
}  // namespace llama::avx2
#pragma GCC pop_options
#endif
