// torch.ops.llama.rms_norm, rotate and swiglu, on CPU: what lies between a layer's products, each in one pass.
//
// PyTorch composes them of three to ten operators; with one row the calls themselves take most of a small model's time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "elementwise.h"
#include "operators.h"
#include "processor.h"
#include "team.h"
#include "tensors.h"

namespace llama {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kNumbersPerThread = 16384;  // less is not worth waking a thread for

template <class T>
ElementwiseKernels<T> find_kernels() {
#if defined(__x86_64__)
  if (has_avx512()) return avx512::elementwise<T>();
  if (has_avx2()) return avx2::elementwise<T>();
#endif
  return scalar::elementwise<T>();
}

// row(kernels, i) for every row, with x's type as that of its arguments.
template <class F>
void for_rows(const Tensor& x, int64_t rows, int64_t columns, F&& row) {
  const auto each = [&](auto zero) {
    const auto kernels = find_kernels<decltype(zero)>();
    const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, columns));
    share(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) row(kernels, i, zero);
    });
  };
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "only bfloat16 and float32 are taken");
  if (x.scalar_type() == ScalarType::Float) {
    each(float(0));
  } else {
    each(uint16_t(0));
  }
}

Tensor rows_of_numbers(Tensor x, int64_t unit) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0 && x.size(-1) % unit == 0, "rows are not multiples of ", unit);
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

}  // namespace

// x (..., columns), weight (columns) as x; -> as x
Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  x = rows_of_numbers(x, 16);
  const int64_t columns = x.size(-1);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == columns && weight.scalar_type() == x.scalar_type(),
                  "rms_norm: the weight is not one number of x's type for each column");
  Tensor out = empty_like(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  const void *from = x.const_data_ptr(), *by = weight.const_data_ptr();
  void* to = out.mutable_data_ptr();
  for_rows(x, x.numel() / columns, columns, [&](const auto& kernels, int64_t i, auto zero) {
    using T = decltype(zero);
    kernels.rms_norm((const T*)from + i * columns, (const T*)by, columns, eps, (T*)to + i * columns);
  });
  return out;
}

// x (tokens, heads, head_dim), of any stride from token to token; cos, sin (tokens, 1, head_dim) float32; -> as x
Tensor rotate(Tensor x, Tensor cos, Tensor sin) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 16 == 0 && x.stride(2) == 1 && x.stride(1) == x.size(2),
                  "rotate takes (tokens, heads, head_dim), heads side by side, head_dim a multiple of 16");
  const int64_t tokens = x.size(0), heads = x.size(1), dim = x.size(2), stride = x.stride(0);
  for (const Tensor& angles : {cos, sin}) {
    STD_TORCH_CHECK(angles.scalar_type() == ScalarType::Float && angles.is_contiguous() &&
                        angles.numel() == tokens * dim,
                    "rotate: cos and sin are not float32 (tokens, 1, head_dim)");
  }
  Tensor out = empty_like(x, {tokens, heads, dim});
  const void* from = x.const_data_ptr();
  const auto *c = (const float*)cos.const_data_ptr(), *s = (const float*)sin.const_data_ptr();
  void* to = out.mutable_data_ptr();
  for_rows(x, tokens, heads * dim, [&](const auto& kernels, int64_t i, auto zero) {
    using T = decltype(zero);
    for (int64_t h = 0; h < heads; ++h)
      kernels.rotate((const T*)from + i * stride + h * dim, c + i * dim, s + i * dim, dim,
                     (T*)to + (i * heads + h) * dim);
  });
  return out;
}

// x (..., 2 * columns): gate and up side by side; -> (..., columns)
Tensor swiglu(Tensor x) {
  x = rows_of_numbers(x, 32);
  const int64_t columns = x.size(-1) / 2;
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = columns;
  Tensor out = empty_like(x, size);
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  for_rows(x, x.numel() / (2 * columns), columns, [&](const auto& kernels, int64_t i, auto zero) {
    using T = decltype(zero);
    const auto* gate = (const T*)from + 2 * i * columns;
    kernels.swiglu(gate, gate + columns, columns, (T*)to + i * columns);
  });
  return out;
}

// x and y of one shape and type, contiguous
Tensor add_to(Tensor x, Tensor y) {
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && x.numel() == y.numel() && y.size(-1) % 16 == 0 &&
                      x.scalar_type() == y.scalar_type(),
                  "add_to: x and y differ in shape or type, or have no multiples of 16 columns");
  const int64_t columns = y.size(-1);
  const void* from = x.const_data_ptr();
  void* to = y.mutable_data_ptr();
  for_rows(y, y.numel() / columns, columns, [&](const auto& kernels, int64_t i, auto zero) {
    using T = decltype(zero);
    kernels.add((const T*)from + i * columns, columns, (T*)to + i * columns);
  });
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("swiglu(Tensor x) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("swiglu", TORCH_BOX(&swiglu));
}

}  // namespace llama
