// torch.ops.llama.attend_rows: rows that each look at their own stored keys and values, on CPU; and store_rows, which
// puts keys or values into the cache.
//
// attend_rows is what decoding does in every layer, for all requests in one call: PyTorch's operators would need a call
// for each, read the keys once for every query head or rearrange them first, and know nothing of runs of slots. Long
// contexts are cut into chunks for the threads (Flash-Decoding, Dao et al. 2023), always at the same places, and merged
// in order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "processor.h"

namespace llama {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNumbersPerThread = 32768;  // of keys, values or parts: less is not worth waking a thread for

AttentionKernels find_kernels(const std::string& variant) {
#if defined(__x86_64__)
  if (has_avx512() && (variant == "auto" || variant == "avx512_vnni")) return avx512::attention();
  if (has_avx2() && (variant == "auto" || variant == "avx2")) return avx2::attention();
#endif
  STD_TORCH_CHECK(variant == "auto" || variant == "scalar", "attend_rows has no kernel '", variant, "' here");
  return scalar::attention();
}

struct Chunk {
  int64_t row, first_run, num_runs, tokens;  // row of q; runs in the list of all runs
};

struct Plan {
  std::vector<Run> runs;  // none is longer than a chunk or crosses its border
  std::vector<Chunk> chunks;
};

// `table`: for each row its number in q, how many runs it sees, and each run's first slot and length.
Plan make_plan(const int64_t* table, int64_t size, int64_t num_rows, int64_t num_slots) {
  Plan plan;
  for (int64_t at = 0; at < size;) {
    STD_TORCH_CHECK(size - at >= 2 && table[at + 1] >= 1 && size - at - 2 >= 2 * table[at + 1] && table[at] >= 0 &&
                        table[at] < num_rows,
                    "attend_rows: the table names no row of q, or ends within one");
    const int64_t row = table[at], count = table[at + 1];
    at += 2;
    int64_t room = 0;
    for (int64_t i = 0; i < count; ++i, at += 2) {
      int64_t slot = table[at], length = table[at + 1];
      STD_TORCH_CHECK(slot >= 0 && length >= 1 && length <= num_slots - slot, "attend_rows: a run leaves the cache");
      while (length) {
        if (room == 0) {
          plan.chunks.push_back({row, (int64_t)plan.runs.size(), 0, 0});
          room = kChunk;
        }
        const int64_t part = std::min(room, length);
        plan.runs.push_back({slot, part});
        ++plan.chunks.back().num_runs, plan.chunks.back().tokens += part;
        slot += part, length -= part, room -= part;
      }
    }
  }
  return plan;
}

float number_at(const void* numbers, int64_t i, bool bfloat16) {
  return bfloat16 ? from_bfloat16(((const uint16_t*)numbers)[i]) : ((const float*)numbers)[i];
}

void check_scales(const char* name, const std::optional<Tensor>& scales, bool int8, int64_t count) {
  STD_TORCH_CHECK(scales.has_value() == int8 && (!int8 || (scales->scalar_type() == ScalarType::Float &&
                                                           scales->is_contiguous() && scales->numel() == count)),
                  name, ": int8 needs one float32 scale for each head and slot, other types none");
}

struct Heads {
  int64_t num, kv, group, dim;
};

// The chunks first ... last - 1 of one row and key head, merged into its `group` rows of `out`.
void merge(const Heads& h, const std::vector<Partial>& partials, int64_t first, int64_t last, int64_t kv, bool bfloat16,
           void* out) {
  std::vector<float> total(h.dim);
  for (int64_t g = 0; g < h.group; ++g) {
    float peak = -INFINITY, sum = 0;
    for (int64_t c = first; c < last; ++c) peak = std::max(peak, partials[c * h.kv + kv].peak[g]);
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t c = first; c < last; ++c) {
      const Partial& p = partials[c * h.kv + kv];
      const float weight = last - first == 1 ? 1.0f : std::exp(p.peak[g] - peak);
      sum += weight * p.sum[g];
      for (int64_t d = 0; d < h.dim; ++d) total[d] += weight * p.values[g * h.dim + d];
    }
    const int64_t at = (kv * h.group + g) * h.dim;
    for (int64_t d = 0; d < h.dim; ++d) {
      if (bfloat16) {
        ((uint16_t*)out)[at + d] = to_bfloat16(total[d] / sum);
      } else {
        ((float*)out)[at + d] = total[d] / sum;
      }
    }
  }
}

// q, out (rows, heads, head_dim); keys, values (kv_heads, slots, head_dim), int8 with scales (kv_heads, slots) float32,
// or of q's type. Rows of `out` that the table does not name are left as they are.
void attend_rows(Tensor q, Tensor keys, Tensor values, std::optional<Tensor> key_scale,
                 std::optional<Tensor> value_scale, Tensor table, Tensor out, std::string variant) {
  const auto type = q.scalar_type(), stored = keys.scalar_type();
  const bool bfloat16 = type == ScalarType::BFloat16, int8 = stored == ScalarType::Char;
  STD_TORCH_CHECK(q.dim() == 3 && keys.dim() == 3 && values.dim() == 3, "attend_rows takes three dimensions");
  STD_TORCH_CHECK((bfloat16 || type == ScalarType::Float) && out.scalar_type() == type &&
                      (int8 || stored == type) && values.scalar_type() == stored,
                  "attend_rows takes bfloat16 or float32, and keys and values of that type or int8");
  const Heads h{q.size(1), keys.size(0), q.size(1) / std::max<int64_t>(keys.size(0), 1), q.size(2)};
  const int64_t slots = keys.size(1);
  STD_TORCH_CHECK(h.kv > 0 && h.group * h.kv == h.num && h.dim % 16 == 0 && keys.size(2) == h.dim,
                  "attend_rows: heads do not fit key heads, or head_dim is no multiple of 16");
  STD_TORCH_CHECK(keys.is_contiguous() && values.is_contiguous() && out.is_contiguous() && q.stride(2) == 1 &&
                      q.stride(1) == h.dim && values.size(0) == h.kv && values.size(1) == slots &&
                      values.size(2) == h.dim && out.size(0) == q.size(0) && out.numel() == q.numel(),
                  "attend_rows: memory is not laid out as expected");
  for (const auto& scales : {key_scale, value_scale}) check_scales("attend_rows", scales, int8, h.kv * slots);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.is_contiguous() && table.dim() == 1,
                  "attend_rows: the table is a row of int64");

  const AttentionKernels kernels = find_kernels(variant);
  const AttendChunk attend = int8 ? kernels.int8 : bfloat16 ? kernels.bfloat16 : kernels.float32;
  const Plan plan = make_plan((const int64_t*)table.const_data_ptr(), table.numel(), q.size(0), slots);
  const int64_t num_chunks = plan.chunks.size(), items = num_chunks * h.kv, part = h.group * (h.dim + 2);
  std::unique_ptr<float[]> memory(new float[items * part]);
  std::vector<Partial> partials(items);
  for (int64_t i = 0; i < items; ++i) {
    float* at = memory.get() + i * part;
    partials[i] = {at, at + h.group * h.dim, at + h.group * (h.dim + 1)};
  }

  std::vector<int64_t> middle(items);  // of each item in the tokens of all: threads share tokens, for chunks differ
  int64_t tokens = 0;
  for (int64_t i = 0; i < items; ++i) {
    middle[i] = tokens + plan.chunks[i / h.kv].tokens / 2;
    tokens += plan.chunks[i / h.kv].tokens;
  }
  const int64_t head_numbers = slots * h.dim, element = int8 ? 1 : bfloat16 ? 2 : 4;
  const void* data = q.const_data_ptr();
  const int64_t fewest = std::max<int64_t>(1, kNumbersPerThread / h.dim);
  torch::stable::parallel_for(0, tokens, fewest, [&](int64_t from, int64_t to) {
    std::vector<float> rows(h.group * h.dim);
    const float scale = 1.0f / std::sqrt((float)h.dim);
    const auto place = [&](int64_t token) {
      return std::lower_bound(middle.begin(), middle.end(), token) - middle.begin();
    };
    for (int64_t i = place(from), end = place(to); i < end; ++i) {
      const Chunk& chunk = plan.chunks[i / h.kv];
      const int64_t kv = i % h.kv, at = chunk.row * q.stride(0) + kv * h.group * h.dim;
      for (int64_t d = 0; d < h.group * h.dim; ++d) rows[d] = scale * number_at(data, at + d, bfloat16);
      const Stored head{(const char*)keys.const_data_ptr() + kv * head_numbers * element,
                        (const char*)values.const_data_ptr() + kv * head_numbers * element,
                        int8 ? (const float*)key_scale->const_data_ptr() + kv * slots : nullptr,
                        int8 ? (const float*)value_scale->const_data_ptr() + kv * slots : nullptr};
      attend(rows.data(), h.group, h.dim, head, &plan.runs[chunk.first_run], chunk.num_runs, partials[i]);
    }
  });

  std::vector<int64_t> starts;  // the first chunk of each row, and the end
  for (int64_t c = 0; c < num_chunks; ++c)
    if (c == 0 || plan.chunks[c].row != plan.chunks[c - 1].row) starts.push_back(c);
  const int64_t num_rows = starts.size();
  starts.push_back(num_chunks);
  const int64_t merges = num_rows * h.kv, merged = std::max<int64_t>(1, items * part / std::max<int64_t>(1, merges));
  const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / merged);
  torch::stable::parallel_for(0, merges, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = starts[i / h.kv], at = plan.chunks[first].row * h.num * h.dim;
      merge(h, partials, first, starts[i / h.kv + 1], i % h.kv, bfloat16,
            (char*)out.mutable_data_ptr() + at * (bfloat16 ? 2 : 4));
    }
  });
}

// rows (tokens, kv_heads, head_dim) into `numbers` (kv_heads, slots, head_dim) at slots (tokens): as they are, or as
// int8 with the largest magnitude of each as 127, one step's worth in scales (kv_heads, slots).
void store_rows(Tensor rows, Tensor slots, Tensor numbers, std::optional<Tensor> scales) {
  const auto type = rows.scalar_type(), stored = numbers.scalar_type();
  const bool bfloat16 = type == ScalarType::BFloat16, int8 = stored == ScalarType::Char;
  STD_TORCH_CHECK((bfloat16 || type == ScalarType::Float) && (int8 || stored == type),
                  "store_rows takes bfloat16 or float32, and stores that type or int8");
  STD_TORCH_CHECK(rows.dim() == 3 && numbers.dim() == 3 && numbers.is_contiguous() &&
                      rows.size(1) == numbers.size(0) && rows.size(2) == numbers.size(2) && rows.stride(2) == 1 &&
                      rows.stride(1) == rows.size(2),
                  "store_rows: memory is not laid out as expected");
  const int64_t tokens = rows.size(0), heads = rows.size(1), dim = rows.size(2), num_slots = numbers.size(1);
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long && slots.is_contiguous() && slots.numel() == tokens,
                  "store_rows: slots are not one int64 for each row");
  check_scales("store_rows", scales, int8, heads * num_slots);
  const auto* place = (const int64_t*)slots.const_data_ptr();
  for (int64_t i = 0; i < tokens; ++i)
    STD_TORCH_CHECK(place[i] >= 0 && place[i] < num_slots, "store_rows: a slot lies outside the cache");

  const int64_t element = bfloat16 ? 2 : 4, stride = rows.stride(0);
  const auto* from = (const char*)rows.const_data_ptr();
  auto* to = (char*)numbers.mutable_data_ptr();
  auto* scale = int8 ? (float*)scales->mutable_data_ptr() : nullptr;
  const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, heads * dim));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * heads; i < end * heads; ++i) {
      const char* row = from + (i / heads * stride + i % heads * dim) * element;
      const int64_t at = i % heads * num_slots + place[i / heads];
      if (int8) {
        const auto number = [&](int64_t d) { return number_at(row, d, bfloat16); };
        constexpr float round_to_even = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
        float peak = 0, not_finite = 0;
        for (int64_t d = 0; d < dim; ++d) peak = std::max(peak, std::abs(number(d))), not_finite += number(d) * 0;
        scale[at] = peak / 127 + not_finite;  // what is no number stays so
        const float step = std::max(peak / 127, 1e-30f);
        auto* codes = (int8_t*)to + at * dim;
        for (int64_t d = 0; d < dim; ++d)
          codes[d] = not_finite == 0 ? (int8_t)(number(d) / step + round_to_even - round_to_even) : 0;
      } else {
        std::memcpy(to + at * dim * element, row, dim * element);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def(
      "attend_rows(Tensor q, Tensor keys, Tensor values, Tensor? key_scale, Tensor? value_scale, Tensor table, "
      "Tensor(a!) out, str variant) -> ()");
  m.def("store_rows(Tensor rows, Tensor slots, Tensor(a!) numbers, Tensor(b!)? scales) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) {
  m.impl("attend_rows", TORCH_BOX(&attend_rows));
  m.impl("store_rows", TORCH_BOX(&store_rows));
}

}  // namespace llama
