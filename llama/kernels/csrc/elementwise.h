// What the instruction-set files offer to elementwise.cpp: plain pointers, no torch. T is float or bfloat16's bits.
#pragma once
#include <cstdint>

namespace llama {

template <class T>
struct ElementwiseKernels {
  // out = x / sqrt(mean(x^2) + eps) * weight, over `columns` numbers
  void (*rms_norm)(const T* x, const T* weight, int64_t columns, float eps, T* out);
  // out = x * cos + (x with neighbours swapped) * sin, over `columns` numbers
  void (*rotate)(const T* x, const float* cos, const float* sin, int64_t columns, T* out);
  // out = silu(gate) * up, over `columns` numbers
  void (*swiglu)(const T* gate, const T* up, int64_t columns, T* out);
  // out += x, over `columns` numbers
  void (*add)(const T* x, int64_t columns, T* out);
};

namespace avx512 { template <class T> ElementwiseKernels<T> elementwise(); }
namespace avx2 { template <class T> ElementwiseKernels<T> elementwise(); }
namespace scalar { template <class T> ElementwiseKernels<T> elementwise(); }

}  // namespace llama
