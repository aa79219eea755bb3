// The operators as functions, for one that is made of others: a call through torch takes longer than a small one does.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "text.h"

namespace llama {

using torch::stable::Tensor;

Tensor rms_norm(Tensor x, Tensor weight, double eps);
Tensor swiglu(Tensor x);
Tensor add_to(Tensor x, Tensor y);  // y + x, in y's place
Tensor dense_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Text variant);
Tensor lowbit_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, Text format, int64_t outputs, Text variant);
void add_low_rank(Tensor y, Tensor x, std::vector<Tensor> factors, std::vector<int64_t> layout, Text variant);  // to y
Tensor attend_rows(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, Tensor keys, Tensor values,
                   std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor table, Text variant);

}  // namespace llama
