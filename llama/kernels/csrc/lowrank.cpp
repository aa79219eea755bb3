// torch.ops.llama.add_low_rank, on CPU: what adapters add to one product, each to its own rows, in one call.
//
// Composed of PyTorch's operators this is two calls for each adapter and product, which take longer than their work.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <vector>

#include "lowrank.h"
#include "operators.h"
#include "processor.h"
#include "team.h"
#include "tensors.h"
#include "text.h"

namespace llama {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 16;
constexpr int64_t kNumbersPerThread = 16384;  // less is not worth waking a thread for

struct Panels {  // b of some neighbouring outputs: [panel][rank][16]
  int64_t ranks, column, columns;
  const void* b;
  int64_t first_rank;
};

struct Change {  // one adapter's, for its rows
  int64_t first_row, rows, ranks;
  bool bfloat16;
  const void* a;  // [rank][column]
  std::vector<Panels> parts;
  float* h;  // [row][rank]
};

template <class T>
LowRankKernels<T> find_kernels(const std::string& variant) {
#if defined(__x86_64__)
  if (has_avx512() && (variant == "auto" || variant == "avx512_vnni")) return avx512::low_rank<T>();
  if (has_avx2() && (variant == "auto" || variant == "avx2")) return avx2::low_rank<T>();
#endif
  STD_TORCH_CHECK(variant == "auto" || variant == "scalar", "add_low_rank: this machine has no kernel '", variant, "'");
  return scalar::low_rank<T>();
}

// `layout` says for each of `factors` its first row, its rows and its parts, then of each part the ranks, the first
// column and the columns.
std::vector<Change> read_layout(const std::vector<Tensor>& factors, const std::vector<int64_t>& layout, int64_t rows,
                                int64_t columns, int64_t outputs) {
  std::vector<Change> changes;
  size_t at = 0;
  const auto take = [&](int64_t most) {
    STD_TORCH_CHECK(at < layout.size() && layout[at] >= 0 && layout[at] <= most, "add_low_rank: impossible layout");
    return layout[at++];
  };
  for (const Tensor& numbers : factors) {
    const bool bfloat16 = numbers.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK((bfloat16 || numbers.scalar_type() == ScalarType::Float) && numbers.is_contiguous(),
                    "add_low_rank takes factors in bfloat16 or float32");
    Change change{.first_row = take(rows), .rows = 0, .ranks = 0, .bfloat16 = bfloat16, .a = numbers.const_data_ptr()};
    change.rows = take(rows - change.first_row);
    change.parts.resize(take(outputs));
    int64_t size = 0;
    for (Panels& part : change.parts) {
      part.first_rank = change.ranks;
      part.ranks = take(numbers.numel());
      part.column = take(outputs);
      part.columns = take(outputs - part.column);
      STD_TORCH_CHECK(part.columns % kTile == 0, "add_low_rank: outputs are not multiples of 16");
      change.ranks += part.ranks;
      size += part.ranks * (columns + part.columns);
    }
    STD_TORCH_CHECK(size == numbers.numel(), "add_low_rank: factors have the wrong size");
    const char* b = (const char*)change.a + change.ranks * columns * (bfloat16 ? 2 : 4);
    for (Panels& part : change.parts) {
      part.b = b;
      b += part.ranks * part.columns * (bfloat16 ? 2 : 4);
    }
    changes.push_back(std::move(change));
  }
  STD_TORCH_CHECK(at == layout.size(), "add_low_rank: impossible layout");
  return changes;
}

// f(piece, begin, end) for the pieces of what is `sizes` long in all, shared among threads; `work`: numbers of one.
template <class F>
void in_pieces(const std::vector<int64_t>& sizes, int64_t work, F&& f) {
  int64_t all = 0;
  for (int64_t size : sizes) all += size;
  const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, work));
  share(all, grain, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (size_t i = 0; i < sizes.size() && start < end; start += sizes[i++]) {
      const int64_t first = std::max(begin, start) - start, last = std::min(end, start + sizes[i]) - start;
      if (first < last) f(i, first, last);
    }
  });
}

}  // namespace

// y (rows, outputs), changed in place; x (rows, columns) of the same type: bfloat16 or float32.
void add_low_rank(Tensor y, Tensor x, std::vector<Tensor> factors, std::vector<int64_t> layout, Text variant) {
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((bfloat16 || x.scalar_type() == ScalarType::Float) && y.scalar_type() == x.scalar_type(),
                  "add_low_rank takes x and y both in bfloat16, or both in float32");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && y.is_contiguous() && x.size(1) % kTile == 0,
                  "add_low_rank takes (rows, columns) and contiguous (rows, outputs), columns a multiple of 16");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t rows = x.size(0), columns = x.size(1), outputs = y.size(1);
  std::vector<Change> changes = read_layout(factors, layout, rows, columns, outputs);
  const auto float32 = find_kernels<float>(variant);
  const auto halves = find_kernels<uint16_t>(variant);

  std::vector<float> numbers;
  const auto* from = (const float*)x.const_data_ptr();
  if (bfloat16) {
    const auto* bits = (const uint16_t*)x.const_data_ptr();
    numbers.resize(rows * columns);
    for (const Change& c : changes)
      for (int64_t i = c.first_row * columns; i < (c.first_row + c.rows) * columns; ++i)
        numbers[i] = from_bfloat16(bits[i]);
    from = numbers.data();
  }
  int64_t num_h = 0, most_rows = 0;
  for (const Change& c : changes) num_h += c.rows * c.ranks, most_rows = std::max(most_rows, c.rows);
  std::vector<float> memory(num_h);
  std::vector<int64_t> num_ranks, num_panels;
  std::vector<std::pair<const Change*, const Panels*>> places;
  float* h = memory.data();
  for (Change& c : changes) {
    c.h = h;
    h += c.rows * c.ranks;
    num_ranks.push_back(c.ranks);
    for (const Panels& part : c.parts) {
      num_panels.push_back(part.columns / kTile);
      places.push_back({&c, &part});
    }
  }

  in_pieces(num_ranks, columns * most_rows, [&](size_t i, int64_t first, int64_t last) {
    const Change& c = changes[i];
    const float* at = from + c.first_row * columns;
    if (c.bfloat16) {
      halves.project(at, c.rows, columns, (const uint16_t*)c.a + first * columns, last - first, c.h + first, c.ranks);
    } else {
      float32.project(at, c.rows, columns, (const float*)c.a + first * columns, last - first, c.h + first, c.ranks);
    }
  });
  void* to = y.mutable_data_ptr();
  in_pieces(num_panels, kTile * most_rows * kTile, [&](size_t i, int64_t first, int64_t last) {
    const auto& [c, part] = places[i];
    const int64_t b = first * part->ranks * kTile, at = c->first_row * outputs + part->column + first * kTile;
    const float* hidden = c->h + part->first_rank;
    const auto add = [&](const auto& kernels, const auto* weight) {
      if (bfloat16) {
        kernels.expand_bfloat16(hidden, c->ranks, c->rows, part->ranks, weight + b, last - first, (uint16_t*)to + at,
                                outputs);
      } else {
        kernels.expand_float(hidden, c->ranks, c->rows, part->ranks, weight + b, last - first, (float*)to + at,
                             outputs);
      }
    };
    if (c->bfloat16) {
      add(halves, (const uint16_t*)part->b);
    } else {
      add(float32, (const float*)part->b);
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def("add_low_rank(Tensor(a!) y, Tensor x, Tensor[] factors, int[] layout, str variant) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) { m.impl("add_low_rank", TORCH_BOX(&add_low_rank)); }

}  // namespace llama
