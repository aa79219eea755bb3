// torch.ops.llama.compute_layer: a layer from its input to its output, on CPU.
//
// Beside one row of a small model the calls of its operators, and the Python between them, take longer than their work.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "operators.h"
#include "tensors.h"
#include "text.h"

namespace llama {
namespace {

// h (tokens, dim); the products' weights, biases, formats (empty: plain numbers) and outputs: qkv, out, gate_up, down;
// the rest as `attend_rows` takes it, whose table names every row; -> (tokens, dim) as h
Tensor compute_layer(Tensor h, Tensor attention_norm, Tensor ffn_norm, double eps, std::vector<Tensor> weights,
                    std::vector<std::optional<Tensor>> biases, std::vector<Text> formats,
                    std::vector<int64_t> outputs, Tensor cos, Tensor sin, Tensor slots, Tensor keys, Tensor values,
                    std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor table) {
  enum { qkv, out, gate_up, down, count };
  STD_TORCH_CHECK(h.dim() == 2 && weights.size() == count && biases.size() == count && formats.size() == count &&
                      outputs.size() == count,
                  "compute_layer takes rows, and four products");
  STD_TORCH_CHECK(keys.dim() == 3 && outputs[qkv] % keys.size(2) == 0, "compute_layer: qkv is not made of heads");
  STD_TORCH_CHECK(outputs[out] == h.size(1) && outputs[down] == h.size(1), "compute_layer: results are not as h");
  const auto product = [&](int which, Tensor x) {
    if (formats[which].empty()) {
      STD_TORCH_CHECK(weights[which].dim() == 2 && weights[which].size(0) == outputs[which],
                      "compute_layer: a weight has not as many rows as it has outputs");
      return dense_linear(x, weights[which], biases[which], "auto");
    }
    return lowbit_linear(x, weights[which], biases[which], formats[which], outputs[which], "auto");
  };
  const int64_t tokens = h.size(0), head_dim = keys.size(2), heads = outputs[qkv] / head_dim;
  const Tensor rows = shaped(product(qkv, rms_norm(h, attention_norm, eps)), {tokens, heads, head_dim});
  const Tensor seen = attend_rows(rows, cos, sin, slots, keys, values, key_scale, value_scale, table, "auto");
  h = add_to(h, product(out, shaped(seen, {tokens, seen.size(1) * head_dim})));
  return add_to(h, product(down, swiglu(product(gate_up, rms_norm(h, ffn_norm, eps)))));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def(
      "compute_layer(Tensor h, Tensor attention_norm, Tensor ffn_norm, float eps, Tensor[] weights, Tensor?[] biases, "
      "str[] formats, int[] outputs, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor(c!)? key_scale, Tensor(d!)? value_scale, Tensor table) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) { m.impl("compute_layer", TORCH_BOX(&compute_layer)); }

}  // namespace llama
