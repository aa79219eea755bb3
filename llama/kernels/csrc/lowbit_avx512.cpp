// AVX-512 with VNNI: Ice Lake, Zen 4 and later.
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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

namespace llama::avx512 {
namespace {

struct Simd {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int max_rows = 8, max_tiles = 3, max_heads = 4, num_sums = 16;  // what 32 registers hold
  static constexpr int byte_offset = 128;  // the product wants unsigned weights: signed ones get 128 more

  static inline Bytes load(const uint8_t* at) { return _mm512_loadu_si512(at); }
  static inline Bytes low(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static inline Bytes high(Bytes v) { return low(_mm512_srli_epi16(v, 4)); }
  template <int mask>  // codes | (plane >> shift & mask) << 4
  static inline LLAMA_INLINE Bytes merge(Bytes codes, Bytes plane, int shift) {
    Bytes moved = shift < 4 ? _mm512_slli_epi16(plane, 4 - shift) : _mm512_srli_epi16(plane, shift - 4);
    return _mm512_ternarylogic_epi32(codes, moved, _mm512_set1_epi8(mask << 4), 0xF8);
  }
  static inline Bytes lookup(const int8_t* table, Bytes codes) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), codes);
  }

  static inline Ints all(int32_t v) { return _mm512_set1_epi32(v); }
  static inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static inline Ints mask(Ints v, int bits) { return _mm512_and_si512(v, all(bits)); }
  static inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
  static inline Ints left(Ints v, int n) { return _mm512_slli_epi32(v, n); }
  static inline Ints right(Ints v, int n) { return _mm512_srli_epi32(v, n); }
  static inline Ints byte(Bytes v, int i) { return mask(right(v, 8 * i), 255); }
  static inline Ints signed_byte(Bytes v, int i) { return _mm512_srai_epi32(left(v, 24 - 8 * i), 24); }
  static inline Ints widen(const uint8_t* at) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)); }
  static inline Ints widen_signed(const uint8_t* at) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
  }
  using Step = Ints;
  static inline Step step(Ints v) { return v; }

  // Sums of products with four activations; `weights` is done once for all rows.
  template <int highest, int offset, int columns>
  struct CodeSum {
    using Code = int8_t;
    using Weights = Bytes;
    static constexpr int most = columns / 4;
    Ints value, now;

    static inline LLAMA_INLINE Bytes weights(Bytes codes) { return codes; }
    static inline void store(Code* at, Ints v) { _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8(v)); }
    static int32_t start(int32_t first, int32_t last) { return first + last; }
    inline LLAMA_INLINE void clear() { value = all(0); }
    inline LLAMA_INLINE void open(int32_t start) { now = all(start); }
    inline LLAMA_INLINE void add(const Bytes& weights, const Code* x) {
      int32_t four;
      std::memcpy(&four, x, 4);
      now = _mm512_dpbusd_epi32(now, weights, all(four));
    }
    inline LLAMA_INLINE void close() { value = now; }
    inline LLAMA_INLINE void close(const Step& step) { value = Simd::add(value, _mm512_mullo_epi32(now, step)); }
  };
  template <int columns>
  struct ByteSum : CodeSum<255, 0, columns> {
    static inline LLAMA_INLINE Bytes weights(Bytes v) { return _mm512_xor_si512(v, _mm512_set1_epi8((char)128)); }
  };
  struct LevelSum {
    using Code = int8_t;
    static constexpr int most = 16;
    struct Weights {
      Bytes high, low;
    };
    ByteSum<64> high, low;
    Ints value;

    static inline LLAMA_INLINE Weights weights(Bytes codes) {
      return {ByteSum<64>::weights(lookup(kNf4.high, codes)), ByteSum<64>::weights(lookup(kNf4.low, codes))};
    }
    static inline void store(Code* at, Ints v) { ByteSum<64>::store(at, v); }
    static int32_t start(int32_t first, int32_t last) { return first + last; }
    inline LLAMA_INLINE void clear() {}
    inline LLAMA_INLINE void open(int32_t start) { high.open(start), low.open(start); }
    inline LLAMA_INLINE void add(const Weights& w, const Code* x) { high.add(w.high, x), low.add(w.low, x); }
    inline LLAMA_INLINE void close() { value = Simd::add(left(high.now, 8), low.now); }
  };

  static inline Floats all(float v) { return _mm512_set1_ps(v); }
  static inline Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
  static inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Floats floats(const uint8_t* at) { return _mm512_loadu_ps(at); }
  static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static inline Floats swap_neighbours(Floats v) { return _mm512_permute_ps(v, 0xB1); }
  static inline Floats negative_magnitude(Floats v) { return _mm512_or_ps(v, all(-0.0f)); }
  static inline Floats where_negative(Floats v, Floats a, Floats b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(v)), b, a);
  }
  static inline float sum(Floats v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  using Register = Floats;
  static constexpr int lanes = 16;
  static inline Register zero() { return _mm512_setzero_ps(); }
  template <class T>
  static inline Register load_register(const T* at) { return numbers(at); }
  template <int count>  // sums, each in the order of `sum`; what stands at `at` behind them is written over
  static inline LLAMA_INLINE void store_sums(float* at, const Register* v) {
    const auto fold = [](__m512 x, __m512 y) LLAMA_INLINE {  // halves of both: of x below, of y above
      return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
    };
    const __m512 x = fold(v[0], v[1]), y = fold(v[2], v[3]);
    const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
    const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4E));
    const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xB1));
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(at, _mm512_castps512_ps128(_mm512_permutexvar_ps(places, one)));
  }
  static inline Ints round(Floats v) { return _mm512_cvtps_epi32(v); }
  static inline Floats times_power_of_two(Floats v, Ints n) {
    return _mm512_castsi512_ps(add(_mm512_castps_si512(v), left(n, 23)));
  }
  static inline Floats numbers(const float* at) { return _mm512_loadu_ps(at); }
  static inline Floats numbers(const uint16_t* at) {  // bfloat16
    return _mm512_castsi512_ps(left(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16));
  }
  static inline Floats numbers(const int8_t* at) { return to_float(widen_signed((const uint8_t*)at)); }
  static inline Floats halves(const uint8_t* at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)); }
  static inline void store(float* at, Floats v) { _mm512_storeu_ps(at, v); }
  static inline void store(uint16_t* at, Floats v) {  // bfloat16, rounded to even
    Ints bits = _mm512_castps_si512(v), odd = mask(right(bits, 16), 1);
    bits = right(add(bits, add(odd, all(0x7fff))), 16);
    _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16(bits));
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
}  // namespace llama::avx512
#pragma GCC pop_options
#endif
