// torch.ops.llama.dense_linear: y = x @ weight.T + bias with a weight of plain numbers, on CPU.
//
// A matrix library makes a product with one row at about half the speed at which memory could be read, and in bfloat16
// far below that where the processor has no instructions for it. The kernel here reads the weight once, from front to
// back; products of more rows than it is faster with are the library's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "dense.h"
#include "operators.h"
#include "processor.h"
#include "team.h"
#include "tensors.h"
#include "text.h"

namespace llama {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kUnit = 16;               // columns that the kernel takes at a time
constexpr int64_t kBytesPerThread = 65536;  // of the weight: less is not worth waking a thread for

// Up to so many rows the kernel is faster than the library: measured with AVX2. Where the library may have AVX-512 some
// rows still wait for memory alone; what more cost there is not known.
int64_t most_rows() { return has_avx512() ? 8 : 64; }

Tensor library_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  torch_multiplied(true);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Shape {
  int64_t rows, columns, outputs;
};

template <class T>
DenseKernel<T> find_kernel(const std::string& variant) {
#if defined(__x86_64__)
  if (has_avx512() && (variant == "auto" || variant == "avx512_vnni")) return avx512::dense<T>();
  if (has_avx2() && (variant == "auto" || variant == "avx2")) return avx2::dense<T>();
#endif
  STD_TORCH_CHECK(variant == "auto" || variant == "scalar", "dense_linear: this machine has no kernel '", variant, "'");
  return scalar::dense<T>();
}

template <class T>
void few_rows(const Shape& s, const float* x, const T* weight, const std::string& variant, float* y) {
  const auto product = find_kernel<T>(variant);
  share(s.outputs, kBytesPerThread / (s.columns * (int64_t)sizeof(T)), [&](int64_t begin, int64_t end) {
    product(x, s.rows, s.columns, weight + begin * s.columns, end - begin, y + begin, s.outputs);
  });
  torch_multiplied(false);
}

}  // namespace

// x (..., columns) bfloat16 or float32; weight (outputs, columns) and bias (outputs) as x; -> (..., outputs) as x
Tensor dense_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Text variant) {
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((bfloat16 || x.scalar_type() == ScalarType::Float) && weight.scalar_type() == x.scalar_type(),
                  "dense_linear takes x and weight both in bfloat16, or both in float32");
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2 && weight.size(1) == x.size(-1) && x.size(-1) > 0 &&
                      x.size(-1) % kUnit == 0,
                  "dense_linear takes rows as long as the weight's, of multiples of 16 columns");
  STD_TORCH_CHECK(!bias || (bias->numel() == weight.size(0) && bias->scalar_type() == x.scalar_type()),
                  "dense_linear: the bias is not one number of x's type for each output");
  const Shape s{x.numel() / x.size(-1), x.size(-1), weight.size(0)};
  if ((variant == "auto" && s.rows > most_rows()) || !weight.is_contiguous()) return library_product(x, weight, bias);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = s.outputs;
  Tensor out = empty_like(x, size);
  if (s.rows == 0 || s.outputs == 0) return out;
  const int64_t numbers = s.rows * s.outputs;
  if (!bfloat16) {
    auto* y = (float*)out.mutable_data_ptr();
    few_rows(s, (const float*)x.const_data_ptr(), (const float*)weight.const_data_ptr(), variant, y);
    if (bias) {
      const auto* add = (const float*)bias->const_data_ptr();
      for (int64_t i = 0; i < numbers; ++i) y[i] += add[i % s.outputs];
    }
    return out;
  }
  const auto* bits = (const uint16_t*)x.const_data_ptr();
  std::vector<float> from(s.rows * s.columns), y(numbers);
  std::transform(bits, bits + from.size(), from.begin(), from_bfloat16);
  few_rows(s, from.data(), (const uint16_t*)weight.const_data_ptr(), variant, y.data());
  const auto* add = bias ? (const uint16_t*)bias->const_data_ptr() : nullptr;
  auto* to = (uint16_t*)out.mutable_data_ptr();
  for (int64_t i = 0; i < numbers; ++i) to[i] = to_bfloat16(y[i] + (add ? from_bfloat16(add[i % s.outputs]) : 0.0f));
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias, str variant) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) { m.impl("dense_linear", TORCH_BOX(&dense_linear)); }

}  // namespace llama
