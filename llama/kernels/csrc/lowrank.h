// What the instruction-set files offer to lowrank.cpp: plain pointers, no torch. T is float or bfloat16's bits.
#pragma once
#include <cstdint>

namespace llama {

template <class T>
struct LowRankKernels {
  // h[i * stride + r] = x[i] . a[r], for `rows` rows x of `columns` floats and `ranks` rows a
  void (*project)(const float* x, int64_t rows, int64_t columns, const T* a, int64_t ranks, float* h, int64_t stride);
  // y[i * outputs + c] += h[i * stride] . b[.][c], for the columns c of `panels` panels b [panel][rank][16]
  void (*expand_float)(const float* h, int64_t stride, int64_t rows, int64_t ranks, const T* b, int64_t panels,
                       float* y, int64_t outputs);
  void (*expand_bfloat16)(const float* h, int64_t stride, int64_t rows, int64_t ranks, const T* b, int64_t panels,
                          uint16_t* y, int64_t outputs);
};

namespace avx512 { template <class T> LowRankKernels<T> low_rank(); }
namespace avx2 { template <class T> LowRankKernels<T> low_rank(); }
namespace scalar { template <class T> LowRankKernels<T> low_rank(); }

}  // namespace llama
