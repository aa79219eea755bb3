// torch.ops.llama.compute_layer, and compute_layers for several at once: layers from input to output, on CPU.
//
// Beside one row of a small model the calls of its operators, and the Python between them, take longer than their work;
// and between two layers the weights that were read have driven the interpreter out of the processor's cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kept.h"
#include "operators.h"
#include "team.h"
#include "tensors.h"
#include "text.h"

// oneDNN's product with a weight in its own order; absent where torch was built without oneDNN, and then nobody has such
// a weight.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* after, const double** numbers,
    int64_t num_numbers, const char** algorithm, AtenTensorHandle* y);

namespace llama {
namespace {

enum { qkv, out, gate_up, down, kProducts };

Tensor blocked_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(aoti_torch_cpu__linear_pointwise, "this torch has no oneDNN, in whose order a layer's weight is");
  AtenTensorHandle added = bias ? bias->get() : nullptr, y;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), bias ? &added : nullptr, "none",
                                                                 nullptr, 0, nullptr, &y));
  torch_multiplied(true);
  return Tensor(y);
}

struct Product {
  Tensor weight;
  std::optional<Tensor> bias;
  Text format;  // empty: plain numbers; "blocked": in the order of oneDNN
  int64_t outputs;

  Tensor operator()(Tensor x) const {
    if (format == "blocked") return blocked_product(x, weight, bias);
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

// What adapters add to a product: see `add_low_rank`.
struct Addition {
  std::vector<Tensor> factors;
  std::vector<int64_t> layout;
};

using Additions = std::vector<Addition>;  // to one product

// `additions`: to each product, or none.
Tensor one_layer(Tensor h, const Tensor& attention_norm, const Tensor& ffn_norm, double eps, const Product* products,
                 const Additions* additions, const Step& step, const Stores& stores) {
  const auto product = [&](int which, const Tensor& x) {
    const Tensor y = products[which](x);
    if (additions)
      for (const Addition& one : additions[which]) add_low_rank(y, x, one.factors, one.layout, "auto");
    return y;
  };
  const Tensor& keys = stores.keys;
  STD_TORCH_CHECK(keys.dim() == 3 && products[qkv].outputs % keys.size(2) == 0, "a layer's qkv is not made of heads");
  STD_TORCH_CHECK(products[out].outputs == h.size(1) && products[down].outputs == h.size(1),
                  "a layer's results are not as h");
  const int64_t tokens = h.size(0), head_dim = keys.size(2), heads = products[qkv].outputs / head_dim;
  const Tensor rows = shaped(product(qkv, rms_norm(h, attention_norm, eps)), {tokens, heads, head_dim});
  const Tensor seen = attend_rows(rows, step.cos, step.sin, step.slots, keys, stores.values, stores.key_scale,
                                  stores.value_scale, step.table, "auto");
  h = add_to(h, product(out, shaped(seen, {tokens, seen.size(1) * head_dim})));
  return add_to(h, product(down, swiglu(product(gate_up, rms_norm(h, ffn_norm, eps)))));
}

struct Layer {
  Tensor attention_norm, ffn_norm;
  Product products[kProducts];
};

struct Layers {
  double eps;
  std::vector<Layer> layers;
};

// Never destroyed: numbers are given back until the process ends.
Kept<Layers>& kept_layers() {
  static auto& kept = *new Kept<Layers>;
  return kept;
}
Kept<std::vector<Stores>>& kept_stores() {
  static auto& kept = *new Kept<std::vector<Stores>>;
  return kept;
}
Kept<std::vector<Additions>>& kept_additions() {  // to each product of each layer
  static auto& kept = *new Kept<std::vector<Additions>>;
  return kept;
}

Layers layers_of(std::vector<Tensor> norms, double eps, std::vector<Tensor> weights,
                 std::vector<std::optional<Tensor>> biases, std::vector<Text> formats, std::vector<int64_t> outputs) {
  const size_t layers = norms.size() / 2, count = layers * kProducts;
  STD_TORCH_CHECK(norms.size() == 2 * layers && weights.size() == count && biases.size() == count &&
                      formats.size() == count && outputs.size() == count,
                  "a layer has two norms and four products");
  Layers all{eps, {}};
  for (size_t i = 0; i < layers; ++i) {
    const auto product = [&](size_t which) {
      which += i * kProducts;
      return Product{weights[which], biases[which], formats[which], outputs[which]};
    };
    all.layers.push_back(
        {norms[2 * i], norms[2 * i + 1], {product(qkv), product(out), product(gate_up), product(down)}});
  }
  return all;
}

Tensor compute(Tensor h, const Layers& all, const std::vector<Additions>* additions, const std::vector<Stores>& stores,
               const Step& step) {
  STD_TORCH_CHECK(h.dim() == 2 && all.layers.size() == stores.size() &&
                      (!additions || additions->size() == stores.size() * kProducts),
                  "layers take rows, and as many keys, values and additions as there are layers");
  for (size_t i = 0; i < stores.size(); ++i) {
    const Layer& layer = all.layers[i];
    h = one_layer(h, layer.attention_norm, layer.ffn_norm, all.eps, layer.products,
                  additions ? additions->data() + i * kProducts : nullptr, step, stores[i]);
  }
  return h;
}

// Of each layer both norms; weights, biases, formats and outputs of its products: qkv, out, gate_up, down
int64_t keep_layers(std::vector<Tensor> norms, double eps, std::vector<Tensor> weights,
                    std::vector<std::optional<Tensor>> biases, std::vector<Text> formats,
                    std::vector<int64_t> outputs) {
  return kept_layers().add(layers_of(norms, eps, weights, biases, formats, outputs));
}

// Of each layer keys and values; and of each, or of none, their scales
int64_t keep_stores(std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<Tensor> key_scales,
                    std::vector<Tensor> value_scales) {
  const size_t layers = keys.size(), scales = key_scales.size();
  STD_TORCH_CHECK(values.size() == layers && value_scales.size() == scales && (scales == 0 || scales == layers),
                  "a layer has keys and values, and scales for both or none");
  std::vector<Stores> all;
  for (size_t i = 0; i < layers; ++i) {
    all.push_back({keys[i], values[i], {}, {}});
    if (scales) all[i].key_scale = key_scales[i], all[i].value_scale = value_scales[i];
  }
  return kept_stores().add(std::move(all));
}

// To `products` products. Of each addition stand in `numbers`: to which, how many factors and how long a layout it has,
// and that.
int64_t keep_additions(int64_t products, std::vector<Tensor> factors, std::vector<int64_t> numbers) {
  std::vector<Additions> all(std::max<int64_t>(products, 0));
  auto number = numbers.begin();
  auto factor = factors.begin();
  while (numbers.end() - number >= 3) {
    const int64_t place = *number++, num_factors = *number++, length = *number++;
    STD_TORCH_CHECK(0 <= place && place < products && 0 <= num_factors && num_factors <= factors.end() - factor &&
                        0 <= length && length <= numbers.end() - number,
                    "impossible additions");
    all[place].push_back({{factor, factor + num_factors}, {number, number + length}});
    factor += num_factors, number += length;
  }
  STD_TORCH_CHECK(factor == factors.end() && number == numbers.end(), "impossible additions");
  return kept_additions().add(std::move(all));
}

void forget_layers(int64_t layers) { kept_layers().remove(layers); }
void forget_stores(int64_t stores) { kept_stores().remove(stores); }
void forget_additions(int64_t additions) { kept_additions().remove(additions); }

// h (tokens, dim) -> (tokens, dim); `additions` may be 0, for none
Tensor compute_layers(Tensor h, int64_t layers, int64_t additions, int64_t stores, Tensor cos, Tensor sin, Tensor slots,
                      Tensor table) {
  const auto added = additions ? kept_additions().at(additions) : nullptr;
  return compute(h, *kept_layers().at(layers), added.get(), *kept_stores().at(stores), {cos, sin, slots, table});
}

// One layer, with all that it takes: exported programs see what an operator reads and changes.
Tensor compute_layer(Tensor h, Tensor attention_norm, Tensor ffn_norm, double eps, std::vector<Tensor> weights,
                     std::vector<std::optional<Tensor>> biases, std::vector<Text> formats,
                     std::vector<int64_t> outputs, Tensor cos, Tensor sin, Tensor slots, Tensor keys, Tensor values,
                     std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor table) {
  return compute(h, layers_of({attention_norm, ffn_norm}, eps, weights, biases, formats, outputs), nullptr,
                 {{keys, values, key_scale, value_scale}}, {cos, sin, slots, table});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def(
      "compute_layer(Tensor h, Tensor attention_norm, Tensor ffn_norm, float eps, Tensor[] weights, Tensor?[] biases, "
      "str[] formats, int[] outputs, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor(c!)? key_scale, Tensor(d!)? value_scale, Tensor table) -> Tensor");
  m.def(
      "keep_layers(Tensor[] norms, float eps, Tensor[] weights, Tensor?[] biases, str[] formats, int[] outputs) "
      "-> int");
  m.def("keep_stores(Tensor[] keys, Tensor[] values, Tensor[] key_scales, Tensor[] value_scales) -> int");
  m.def("keep_additions(int products, Tensor[] factors, int[] numbers) -> int");
  m.def("forget_layers(int layers) -> ()");
  m.def("forget_stores(int stores) -> ()");
  m.def("forget_additions(int additions) -> ()");
  m.def(
      "compute_layers(Tensor h, int layers, int additions, int stores, Tensor cos, Tensor sin, Tensor slots, "
      "Tensor table) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) {
  m.impl("compute_layer", TORCH_BOX(&compute_layer));
  m.impl("compute_layers", TORCH_BOX(&compute_layers));
}
STABLE_TORCH_LIBRARY_IMPL(llama, MkldnnCPU, m) {  // which it is where a weight is in oneDNN's order
  m.impl("compute_layer", TORCH_BOX(&compute_layer));
}
STABLE_TORCH_LIBRARY_IMPL(llama, CompositeExplicitAutograd, m) {
  m.impl("keep_layers", TORCH_BOX(&keep_layers));
  m.impl("keep_stores", TORCH_BOX(&keep_stores));
  m.impl("keep_additions", TORCH_BOX(&keep_additions));
  m.impl("forget_additions", TORCH_BOX(&forget_additions));
  m.impl("forget_layers", TORCH_BOX(&forget_layers));
  m.impl("forget_stores", TORCH_BOX(&forget_stores));
}

}  // namespace llama
