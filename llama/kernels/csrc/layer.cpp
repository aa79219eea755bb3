// torch.ops.llama.compute_layer, and compute_layers for several at once: layers from input to output, on CPU.
//
// Beside one row of a small model the calls of its operators, and the Python between them, take longer than their work;
// and between two layers the weights that were read have driven the interpreter out of the processor's cache.
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

enum { qkv, out, gate_up, down, kProducts };

struct Product {
  Tensor weight;
  std::optional<Tensor> bias;
  Text format;  // empty: plain numbers
  int64_t outputs;

  Tensor operator()(Tensor x) const {
    if (!format.empty()) return lowbit_linear(x, weight, bias, format, outputs, "auto");
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == outputs,
                    "a layer's weight has not as many rows as it has outputs");
    return dense_linear(x, weight, bias, "auto");
  }
};

// What a step's layers share, as `attend_rows` takes it; the table names every row.
struct Step {
  Tensor cos, sin, slots, table;
};

struct Stores {
  Tensor keys, values;
  std::optional<Tensor> key_scale, value_scale;
};

Tensor one_layer(Tensor h, const Tensor& attention_norm, const Tensor& ffn_norm, double eps, const Product* products,
                 const Step& step, const Stores& stores) {
  const Tensor& keys = stores.keys;
  STD_TORCH_CHECK(keys.dim() == 3 && products[qkv].outputs % keys.size(2) == 0, "a layer's qkv is not made of heads");
  STD_TORCH_CHECK(products[out].outputs == h.size(1) && products[down].outputs == h.size(1),
                  "a layer's results are not as h");
  const int64_t tokens = h.size(0), head_dim = keys.size(2), heads = products[qkv].outputs / head_dim;
  const Tensor rows = shaped(products[qkv](rms_norm(h, attention_norm, eps)), {tokens, heads, head_dim});
  const Tensor seen = attend_rows(rows, step.cos, step.sin, step.slots, keys, stores.values, stores.key_scale,
                                  stores.value_scale, step.table, "auto");
  h = add_to(h, products[out](shaped(seen, {tokens, seen.size(1) * head_dim})));
  return add_to(h, products[down](swiglu(products[gate_up](rms_norm(h, ffn_norm, eps)))));
}

// h (tokens, dim); of each layer both norms; weights, biases, formats and outputs of its products: qkv, out, gate_up,
// down; keys and values, and their scales, or none; -> (tokens, dim) as h
Tensor compute_layers(Tensor h, std::vector<Tensor> norms, double eps, std::vector<Tensor> weights,
                      std::vector<std::optional<Tensor>> biases, std::vector<Text> formats,
                      std::vector<int64_t> outputs, Tensor cos, Tensor sin, Tensor slots, std::vector<Tensor> keys,
                      std::vector<Tensor> values, std::vector<Tensor> key_scales, std::vector<Tensor> value_scales,
                      Tensor table) {
  const size_t layers = keys.size(), count = layers * kProducts, scales = key_scales.size();
  STD_TORCH_CHECK(h.dim() == 2 && norms.size() == 2 * layers && values.size() == layers && weights.size() == count &&
                      biases.size() == count && formats.size() == count && outputs.size() == count &&
                      (scales == 0 || scales == layers) && value_scales.size() == scales,
                  "compute_layers takes rows, and of each layer two norms, four products, keys and values");
  const Step step{cos, sin, slots, table};
  for (size_t i = 0; i < layers; ++i) {
    const auto product = [&](size_t which) {
      which += i * kProducts;
      return Product{weights[which], biases[which], formats[which], outputs[which]};
    };
    const Product products[kProducts] = {product(qkv), product(out), product(gate_up), product(down)};
    Stores stores{keys[i], values[i], {}, {}};
    if (scales) stores.key_scale = key_scales[i], stores.value_scale = value_scales[i];
    h = one_layer(h, norms[2 * i], norms[2 * i + 1], eps, products, step, stores);
  }
  return h;
}

// The same of one: exported programs do not know which tensors of a list an operator changes.
Tensor compute_layer(Tensor h, Tensor attention_norm, Tensor ffn_norm, double eps, std::vector<Tensor> weights,
                     std::vector<std::optional<Tensor>> biases, std::vector<Text> formats,
                     std::vector<int64_t> outputs, Tensor cos, Tensor sin, Tensor slots, Tensor keys, Tensor values,
                     std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor table) {
  std::vector<Tensor> key_scales, value_scales;
  if (key_scale) key_scales = {*key_scale};
  if (value_scale) value_scales = {*value_scale};
  return compute_layers(h, {attention_norm, ffn_norm}, eps, weights, biases, formats, outputs, cos, sin, slots, {keys},
                        {values}, key_scales, value_scales, table);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def(
      "compute_layer(Tensor h, Tensor attention_norm, Tensor ffn_norm, float eps, Tensor[] weights, Tensor?[] biases, "
      "str[] formats, int[] outputs, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor(c!)? key_scale, Tensor(d!)? value_scale, Tensor table) -> Tensor");
  m.def(
      "compute_layers(Tensor h, Tensor[] norms, float eps, Tensor[] weights, Tensor?[] biases, str[] formats, "
      "int[] outputs, Tensor cos, Tensor sin, Tensor slots, Tensor(a!)[] keys, Tensor(b!)[] values, "
      "Tensor(c!)[] key_scales, Tensor(d!)[] value_scales, Tensor table) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) {
  m.impl("compute_layer", TORCH_BOX(&compute_layer));
  m.impl("compute_layers", TORCH_BOX(&compute_layers));
}

}  // namespace llama
