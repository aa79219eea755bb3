// Plain C++ for every other processor; what the compiler makes of loops over 16 lanes.
#include "attention.h"
#include "dense.h"
#include "elementwise.h"
#include "lowbit.h"
#include "lowrank.h"
#include "processor.h"
#undef LLAMA_INLINE
#undef LLAMA_UNROLL
#define LLAMA_INLINE  // without vector registers they would only make the code long
#define LLAMA_UNROLL
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

namespace llama::scalar {
namespace {

template <class T, int n>
struct Lanes {
  T v[n];
};

struct Simd {
  using Bytes = Lanes<uint8_t, 64>;
  using Ints = Lanes<int32_t, 16>;
  using Floats = Lanes<float, 16>;
  static constexpr int max_rows = 1, max_tiles = 1, max_heads = 4, num_sums = 1;
  static constexpr int byte_offset = 0;

  template <class To, class F>
  static inline To each(F&& f) {
    To out;
    for (int i = 0; i < (int)(sizeof(out.v) / sizeof(out.v[0])); ++i) out.v[i] = f(i);
    return out;
  }
  static inline Bytes load(const uint8_t* at) {
    Bytes out;
    std::memcpy(out.v, at, 64);
    return out;
  }
  static inline Bytes low(const Bytes& v) { return each<Bytes>([&](int i) { return v.v[i] & 15; }); }
  static inline Bytes high(const Bytes& v) { return each<Bytes>([&](int i) { return v.v[i] >> 4; }); }
  template <int mask>  // codes | (plane >> shift & mask) << 4
  static inline Bytes merge(const Bytes& codes, const Bytes& plane, int shift) {
    return each<Bytes>([&](int i) { return codes.v[i] | (plane.v[i] >> shift & mask) << 4; });
  }
  static inline Bytes lookup(const int8_t* table, const Bytes& codes) {
    return each<Bytes>([&](int i) { return (uint8_t)table[codes.v[i]]; });
  }

  static inline Ints all(int32_t v) { return each<Ints>([&](int) { return v; }); }
  static inline Ints add(const Ints& a, const Ints& b) { return each<Ints>([&](int i) { return a.v[i] + b.v[i]; }); }
  static inline Ints mask(const Ints& v, int bits) { return each<Ints>([&](int i) { return v.v[i] & bits; }); }
  static inline Ints either(const Ints& a, const Ints& b) { return each<Ints>([&](int i) { return a.v[i] | b.v[i]; }); }
  static inline Ints left(const Ints& v, int n) { return each<Ints>([&](int i) { return v.v[i] * (1 << n); }); }
  static inline Ints right(const Ints& v, int n) { return each<Ints>([&](int i) { return v.v[i] >> n; }); }
  static inline Ints byte(const Bytes& v, int c) { return each<Ints>([&](int i) { return v.v[4 * i + c]; }); }
  static inline Ints signed_byte(const Bytes& v, int c) {
    return each<Ints>([&](int i) { return (int8_t)v.v[4 * i + c]; });
  }
  static inline Ints widen(const uint8_t* at) { return each<Ints>([&](int i) { return at[i]; }); }
  static inline Ints widen_signed(const uint8_t* at) { return each<Ints>([&](int i) { return (int8_t)at[i]; }); }
  using Step = Ints;
  static inline Step step(const Ints& v) { return v; }

  // Sums of products with four activations; `weights` is done once for all rows.
  template <class Weight, int columns>
  struct Sum {
    using Code = int8_t;
    using Weights = Bytes;
    static constexpr int most = columns / 4;
    Ints value, now;

    static Bytes weights(const Bytes& codes) { return codes; }
    static void store(Code* at, const Ints& v) {
      for (int i = 0; i < 16; ++i) at[i] = (Code)v.v[i];
    }
    static int32_t start(int32_t first, int32_t last) { return first + last; }
    void clear() { value = all(0); }
    void open(int32_t start) { now = all(start); }
    void add(const Bytes& w, const Code* x) {
      now = each<Ints>([&](int i) {
        const auto* c = (const Weight*)w.v + 4 * i;
        return now.v[i] + c[0] * x[0] + c[1] * x[1] + c[2] * x[2] + c[3] * x[3];
      });
    }
    void close() { value = now; }
    void close(const Step& step) {
      value = each<Ints>([&](int i) { return value.v[i] + now.v[i] * step.v[i]; });
    }
  };
  template <int highest, int offset, int columns>
  using CodeSum = Sum<uint8_t, columns>;
  template <int columns>
  using ByteSum = Sum<int8_t, columns>;
  struct LevelSum {
    using Code = int8_t;
    static constexpr int most = 16;
    struct Weights {
      Bytes high, low;
    };
    ByteSum<64> high, low;
    Ints value;

    static Weights weights(const Bytes& codes) { return {lookup(kNf4.high, codes), lookup(kNf4.low, codes)}; }
    static void store(Code* at, const Ints& v) { ByteSum<64>::store(at, v); }
    static int32_t start(int32_t first, int32_t last) { return first + last; }
    void clear() {}
    void open(int32_t start) { high.open(start), low.open(start); }
    void add(const Weights& w, const Code* x) { high.add(w.high, x), low.add(w.low, x); }
    void close() { value = Simd::add(left(high.now, 8), low.now); }
  };

  static inline Floats all(float v) { return each<Floats>([&](int) { return v; }); }
  static inline Floats to_float(const Ints& v) { return each<Floats>([&](int i) { return (float)v.v[i]; }); }
  static inline Floats multiply(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] * b.v[i]; });
  }
  static inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static inline Floats add(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] + b.v[i]; });
  }
  static inline Floats maximum(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static inline Floats divide(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] / b.v[i]; });
  }
  static inline Floats swap_neighbours(const Floats& v) {
    return each<Floats>([&](int i) { return v.v[i ^ 1]; });
  }
  static inline Floats negative_magnitude(const Floats& v) {
    return each<Floats>([&](int i) { return -__builtin_fabsf(v.v[i]); });
  }
  static inline Floats where_negative(const Floats& v, const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return __builtin_signbit(v.v[i]) ? a.v[i] : b.v[i]; });
  }
  static inline float sum(const Floats& v) {
    float total = 0;
    for (float number : v.v) total += number;
    return total;
  }
  using Register = Floats;
  static constexpr int lanes = 16;
  static inline Register zero() { return all(0.0f); }
  template <class T>
  static inline Register load_register(const T* at) { return numbers(at); }
  template <int count>
  static inline void store_sums(float* at, const Register* v) {
    for (int i = 0; i < count; ++i) at[i] = sum(v[i]);
  }
  static inline Ints round(const Floats& v) {  // what is not a number gives 0
    return each<Ints>([&](int i) { return v.v[i] == v.v[i] ? (int32_t)__builtin_rintf(v.v[i]) : 0; });
  }
  static inline Floats times_power_of_two(const Floats& v, const Ints& n) {
    return each<Floats>([&](int i) {
      int32_t bits;
      float number;
      std::memcpy(&bits, v.v + i, 4);
      bits += n.v[i] * (1 << 23);
      std::memcpy(&number, &bits, 4);
      return number;
    });
  }
  static inline Floats numbers(const float* at) { return floats((const uint8_t*)at); }
  static inline Floats numbers(const uint16_t* at) {
    return each<Floats>([&](int i) { return from_bfloat16(at[i]); });
  }
  static inline Floats numbers(const int8_t* at) { return each<Floats>([&](int i) { return (float)at[i]; }); }
  static inline Floats floats(const uint8_t* at) {
    Floats out;
    std::memcpy(out.v, at, 64);
    return out;
  }
  // float16: its exponent moves to float32's place, and one multiplication corrects the bias, subnormals included.
  static inline float half(const uint8_t* at) {
    uint16_t h;
    std::memcpy(&h, at, 2);
    const uint32_t bits = (uint32_t)(h & 0x7fff) << 13 | (uint32_t)(h & 0x8000) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f * 0x1p112f;
  }
  static inline Floats halves(const uint8_t* at) { return each<Floats>([&](int i) { return half(at + 2 * i); }); }
  static inline void store(float* at, const Floats& v) { std::memcpy(at, v.v, 64); }
  static inline void store(uint16_t* at, const Floats& v) {  // bfloat16, rounded to even
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      std::memcpy(&bits, v.v + i, 4);
      at[i] = (uint16_t)((bits + (bits >> 16 & 1) + 0x7fff) >> 16);
    }
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
}  // namespace llama::scalar
