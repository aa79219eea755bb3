// What the instruction-set files offer to dense.cpp: plain pointers, no torch. T is float or bfloat16's bits.
#pragma once
#include <cstdint>

namespace llama {

// y[i * stride + o] = x[i] . weight[o], for `rows` rows x of `columns` floats and `outputs` rows of the weight
template <class T>
using DenseKernel = void (*)(const float* x, int64_t rows, int64_t columns, const T* weight, int64_t outputs, float* y,
                             int64_t stride);

namespace avx512 { template <class T> DenseKernel<T> dense(); }
namespace avx2 { template <class T> DenseKernel<T> dense(); }
namespace scalar { template <class T> DenseKernel<T> dense(); }

}  // namespace llama
