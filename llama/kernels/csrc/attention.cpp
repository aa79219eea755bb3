// torch.ops.llama.attend_rows: what a step does with the cache in a layer, on CPU. Queries and keys are turned by their
// positions' angles, keys and values stored, and single rows look each at their own request's stored tokens.
//
// PyTorch's operators would need some calls for each request, read the keys once for every query head or rearrange them
// first, and know nothing of runs of slots; in a small model the calls alone take as long as the work. Long contexts
// are cut into chunks for the threads (Flash-Decoding, Dao et al. 2023), always at the same places, and merged in
// order. Rows that see the same chunk are computed together, each to the bits that it would have alone.
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
#include "elementwise.h"
#include "operators.h"
#include "processor.h"
#include "team.h"
#include "tensors.h"

namespace llama {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kNumbersPerThread = 32768;  // of keys, values or parts: less is not worth waking a thread for
constexpr int64_t kMostRows = 8;  // that are computed together: their queries and scores stay in the nearest caches

struct Kernels {
  AttentionKernels attention;
  ElementwiseKernels<float> float32;
  ElementwiseKernels<uint16_t> bfloat16;
};

Kernels find_kernels(const std::string& variant) {
#if defined(__x86_64__)
  if (has_avx512() && (variant == "auto" || variant == "avx512_vnni"))
    return {avx512::attention(), avx512::elementwise<float>(), avx512::elementwise<uint16_t>()};
  if (has_avx2() && (variant == "auto" || variant == "avx2"))
    return {avx2::attention(), avx2::elementwise<float>(), avx2::elementwise<uint16_t>()};
#endif
  STD_TORCH_CHECK(variant == "auto" || variant == "scalar", "attend_rows has no kernel '", variant, "' here");
  return {scalar::attention(), scalar::elementwise<float>(), scalar::elementwise<uint16_t>()};
}

struct Chunk {
  int64_t row, first_run, num_runs, tokens;  // row of q; runs in the list of all runs
};

// Chunks of rows that follow one another in the table, each of them the beginning of the next: a request's rows of one
// step, or requests that share a prefix. Their keys and values are read once for all.
struct Bundle {
  int64_t rows = 0, chunks[kMostRows];
};

struct Plan {
  std::vector<Run> runs;      // none is longer than a chunk or crosses its border
  std::vector<Chunk> chunks;  // row by row
  std::vector<Bundle> bundles;

  // Whether the tokens of chunk `b` begin with all those of chunk `a`.
  bool begins_with(const Chunk& b, const Chunk& a) const {
    const Run *whole = &runs[b.first_run], *beginning = &runs[a.first_run];
    if (a.num_runs > b.num_runs) return false;
    for (int64_t i = 0; i < a.num_runs; ++i) {
      const bool ends = i == a.num_runs - 1;  // where b's run may go on
      if (beginning[i].slot != whole[i].slot || beginning[i].length > whole[i].length) return false;
      if (beginning[i].length < whole[i].length && !ends) return false;
    }
    return true;
  }
};

// `table`: for each row its number in q, how many runs it sees, and each run's first slot and length.
Plan make_plan(const int64_t* table, int64_t size, int64_t num_rows, int64_t num_slots) {
  Plan plan;
  std::vector<int64_t> bundle_of;  // each chunk's
  int64_t before = 0, first = 0;   // chunk of the row before, and of this one
  for (int64_t at = 0; at < size; before = first, first = plan.chunks.size()) {
    STD_TORCH_CHECK(size - at >= 2 && table[at + 1] >= 1 && (size - at - 2) / 2 >= table[at + 1] && table[at] >= 0 &&
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
    for (int64_t c = first; c < (int64_t)plan.chunks.size(); ++c) {
      const int64_t above = before + c - first;  // the row before's in this place
      const bool joins = above < first && plan.bundles[bundle_of[above]].rows < kMostRows &&
                         plan.begins_with(plan.chunks[c], plan.chunks[above]);
      if (!joins) plan.bundles.emplace_back();
      bundle_of.push_back(joins ? bundle_of[above] : plan.bundles.size() - 1);
      Bundle& bundle = plan.bundles[bundle_of[c]];
      bundle.chunks[bundle.rows++] = c;
    }
  }
  return plan;
}

float number_at(const void* numbers, int64_t i, bool bfloat16) {
  return bfloat16 ? from_bfloat16(((const uint16_t*)numbers)[i]) : ((const float*)numbers)[i];
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
    if (bfloat16) {
      for (int64_t d = 0; d < h.dim; ++d) ((uint16_t*)out)[at + d] = to_bfloat16(total[d] / sum);
    } else {
      for (int64_t d = 0; d < h.dim; ++d) ((float*)out)[at + d] = total[d] / sum;
    }
  }
}

// What one call works on: `stride` numbers from token to token, query heads before key heads before value heads.
struct Step {
  const char* qkv;
  int64_t stride;
  const float *cos, *sin;          // [token][dim]
  const int64_t* slots;            // of each token
  char *keys, *values;             // [key head][slot][dim]
  float *key_scale, *value_scale;  // [key head][slot] of int8, or null
  Heads heads;
  int64_t num_tokens, num_slots;
  bool bfloat16, int8;
  Kernels kernels;

  int64_t row_bytes() const { return heads.dim * (bfloat16 ? 2 : 4); }
  const char* row(int64_t token, int64_t head) const {
    return qkv + (token * stride + head * heads.dim) * (bfloat16 ? 2 : 4);
  }
  // A row turned by its token's angles, in its own type.
  void rotate(int64_t token, int64_t head, void* out) const {
    const void* from = row(token, head);
    const float *c = cos + token * heads.dim, *s = sin + token * heads.dim;
    if (bfloat16) {
      kernels.bfloat16.rotate((const uint16_t*)from, c, s, heads.dim, (uint16_t*)out);
    } else {
      kernels.float32.rotate((const float*)from, c, s, heads.dim, (float*)out);
    }
  }
};

// A row into a slot: as it is, or as int8 with its largest magnitude as 127, and what a step of that is worth.
void store(const Step& s, const char* row, int64_t at, char* numbers, float* scale) {
  const int64_t dim = s.heads.dim;
  if (!s.int8) {
    std::memcpy(numbers + at * s.row_bytes(), row, s.row_bytes());
    return;
  }
  const auto number = [&](int64_t d) { return number_at(row, d, s.bfloat16); };
  constexpr float round_to_even = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  float peak = 0, not_finite = 0;
  for (int64_t d = 0; d < dim; ++d) peak = std::max(peak, std::abs(number(d))), not_finite += number(d) * 0;
  scale[at] = peak / 127 + not_finite;  // what is no number stays so
  const float step = std::max(peak / 127, 1e-30f);
  auto* codes = (int8_t*)numbers + at * dim;
  for (int64_t d = 0; d < dim; ++d)
    codes[d] = not_finite == 0 ? (int8_t)(number(d) / step + round_to_even - round_to_even) : 0;
}

void store_tokens(const Step& s) {
  const Heads& h = s.heads;
  const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / (h.kv * h.dim));
  share(s.num_tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<char> turned(s.row_bytes());
    for (int64_t i = begin * h.kv; i < end * h.kv; ++i) {
      const int64_t token = i / h.kv, kv = i % h.kv, at = kv * s.num_slots + s.slots[token];
      s.rotate(token, h.num + kv, turned.data());
      store(s, turned.data(), at, s.keys, s.key_scale);
      store(s, s.row(token, h.num + h.kv + kv), at, s.values, s.value_scale);
    }
  });
}

// A bundle and one key head.
struct Item {
  const Bundle* bundle;
  int64_t kv, middle;  // in the tokens that all items look at: threads share tokens, for items differ
};

// The queries of a row's heads that share a key head, turned and scaled: [head][head_dim].
void load_queries(const Step& s, int64_t row, int64_t kv, char* turned, float* queries) {
  const Heads& h = s.heads;
  const float scale = 1.0f / std::sqrt((float)h.dim);
  for (int64_t g = 0; g < h.group; ++g, queries += h.dim) {
    s.rotate(row, kv * h.group + g, s.bfloat16 ? turned : (char*)queries);
    if (s.bfloat16)
      for (int64_t d = 0; d < h.dim; ++d) queries[d] = from_bfloat16(((const uint16_t*)turned)[d]);
    for (int64_t d = 0; d < h.dim; ++d) queries[d] *= scale;
  }
}

// Fills the rows of `out` that the plan names.
void attend(const Step& s, const Plan& plan, void* out) {
  const Heads& h = s.heads;
  const AttendChunk attend_chunk = s.int8       ? s.kernels.attention.int8
                                   : s.bfloat16 ? s.kernels.attention.bfloat16
                                                : s.kernels.attention.float32;
  const int64_t num_chunks = plan.chunks.size(), values = h.group * h.dim;
  const int64_t size = num_chunks * h.kv * (values + 2 * h.group);
  std::unique_ptr<float[]> memory(new float[size]);
  std::vector<Partial> partials(num_chunks * h.kv);
  std::vector<Item> items;
  items.reserve(plan.bundles.size() * h.kv);
  int64_t tokens = 0;
  float* free = memory.get();
  for (int64_t kv = 0; kv < h.kv; ++kv) {  // one after the other: what a key head has of a request stays in the cache
    for (const Bundle& bundle : plan.bundles) {
      int64_t some = 0;
      float *peak = free + bundle.rows * values, *sum = peak + bundle.rows * h.group;
      for (int64_t i = 0; i < bundle.rows; ++i) {
        some += plan.chunks[bundle.chunks[i]].tokens;
        partials[bundle.chunks[i] * h.kv + kv] = {free + i * values, peak + i * h.group, sum + i * h.group};
      }
      free = sum + bundle.rows * h.group;
      items.push_back({&bundle, kv, tokens + some / 2});
      tokens += some;
    }
  }

  const int64_t head_bytes = s.num_slots * (s.int8 ? h.dim : s.row_bytes());
  const int64_t fewest = std::max<int64_t>(1, kNumbersPerThread / h.dim);
  share(tokens, fewest, [&](int64_t from, int64_t to) {
    std::vector<char> turned(s.row_bytes());
    std::unique_ptr<float[]> room(new float[kMostRows * h.group * (h.dim + kChunk)]);
    float *queries = room.get(), *scores = queries + kMostRows * values;
    int64_t seen[kMostRows];
    const auto place = [&](int64_t token) {
      const auto before = [](const Item& item, int64_t t) { return item.middle < t; };
      return std::lower_bound(items.begin(), items.end(), token, before);
    };
    const auto fetch = [&](const Item& item) {  // rows of qkv lie too far apart for the processor to foresee them
      for (int64_t i = 0; i < item.bundle->rows; ++i) {
        const char* heads = s.row(plan.chunks[item.bundle->chunks[i]].row, item.kv * h.group);
        for (int64_t byte = 0; byte < h.group * s.row_bytes(); byte += 64) __builtin_prefetch(heads + byte);
      }
    };
    for (auto item = place(from), end = place(to); item < end; ++item) {
      if (item + 1 < end) fetch(item[1]);
      const auto& [bundle, kv, middle] = *item;
      for (int64_t i = 0; i < bundle->rows; ++i) {
        const Chunk& chunk = plan.chunks[bundle->chunks[i]];
        seen[i] = chunk.tokens;
        load_queries(s, chunk.row, kv, turned.data(), queries + i * values);
      }
      const Stored head{s.keys + kv * head_bytes, s.values + kv * head_bytes,
                        s.int8 ? s.key_scale + kv * s.num_slots : nullptr,
                        s.int8 ? s.value_scale + kv * s.num_slots : nullptr};
      const Chunk& longest = plan.chunks[bundle->chunks[bundle->rows - 1]];
      attend_chunk({queries, bundle->rows, h.group, h.dim, seen}, head, &plan.runs[longest.first_run], scores,
                   partials[bundle->chunks[0] * h.kv + kv]);
    }
  });

  std::vector<int64_t> starts;  // the first chunk of each row, and the end
  for (int64_t c = 0; c < num_chunks; ++c)
    if (c == 0 || plan.chunks[c].row != plan.chunks[c - 1].row) starts.push_back(c);
  const int64_t num_rows = starts.size();
  starts.push_back(num_chunks);
  const int64_t merges = num_rows * h.kv, merged = std::max<int64_t>(1, size / std::max<int64_t>(1, merges));
  const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / merged);
  share(merges, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = starts[i / h.kv], at = plan.chunks[first].row * h.num * s.row_bytes();
      merge(h, partials, first, starts[i / h.kv + 1], i % h.kv, s.bfloat16, (char*)out + at);
    }
  });
}

}  // namespace

// qkv (tokens, heads, head_dim); cos, sin (tokens, 1, head_dim) float32; slots (tokens).
// keys, values (kv_heads, num_slots, head_dim): int8 with scales (kv_heads, num_slots) float32, or of qkv's type.
// -> (tokens, query heads, head_dim) as qkv; rows that the table does not name hold nothing.
Tensor attend_rows(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, Tensor keys, Tensor values,
                   std::optional<Tensor> key_scale, std::optional<Tensor> value_scale, Tensor table, Text variant) {
  const auto type = qkv.scalar_type(), stored = keys.scalar_type();
  const bool bfloat16 = type == ScalarType::BFloat16, int8 = stored == ScalarType::Char;
  STD_TORCH_CHECK((bfloat16 || type == ScalarType::Float) && (int8 || stored == type) && values.scalar_type() == stored,
                  "attend_rows takes bfloat16 or float32, and keys and values of that type or int8");
  STD_TORCH_CHECK(qkv.dim() == 3 && keys.dim() == 3 && values.dim() == 3, "attend_rows takes three dimensions");
  const int64_t tokens = qkv.size(0), dim = qkv.size(2), kv = keys.size(0), num_slots = keys.size(1);
  const int64_t queries = qkv.size(1) - 2 * kv;
  STD_TORCH_CHECK(kv > 0 && queries > 0 && queries % kv == 0 && dim > 0 && dim % 16 == 0,
                  "attend_rows: heads do not fit key heads, or head_dim is no multiple of 16");
  STD_TORCH_CHECK(qkv.stride(2) == 1 && qkv.stride(1) == dim, "attend_rows: heads do not lie side by side");
  for (const Tensor& x : {keys, values})
    STD_TORCH_CHECK(x.is_contiguous() && x.size(0) == kv && x.size(1) == num_slots && x.size(2) == dim,
                    "attend_rows: the cache is not laid out as expected");
  for (const Tensor& x : {cos, sin})
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == tokens * dim,
                    "attend_rows: cos and sin are not float32 (tokens, 1, head_dim)");
  for (const auto& x : {key_scale, value_scale})
    STD_TORCH_CHECK(x.has_value() == int8 && (!int8 || (x->scalar_type() == ScalarType::Float && x->is_contiguous() &&
                                                        x->numel() == kv * num_slots)),
                    "attend_rows: int8 needs one float32 scale for each head and slot, other types none");
  for (const Tensor& x : {slots, table})
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.dim() == 1,
                    "attend_rows: slots and table are rows of int64");
  STD_TORCH_CHECK(slots.numel() == tokens, "attend_rows: slots are not one for each token");
  const auto* place = (const int64_t*)slots.const_data_ptr();
  for (int64_t i = 0; i < tokens; ++i)
    STD_TORCH_CHECK(place[i] >= 0 && place[i] < num_slots, "attend_rows: a slot lies outside the cache");

  const Step step{
      .qkv = (const char*)qkv.const_data_ptr(),
      .stride = qkv.stride(0),
      .cos = (const float*)cos.const_data_ptr(),
      .sin = (const float*)sin.const_data_ptr(),
      .slots = place,
      .keys = (char*)keys.mutable_data_ptr(),
      .values = (char*)values.mutable_data_ptr(),
      .key_scale = int8 ? (float*)key_scale->mutable_data_ptr() : nullptr,
      .value_scale = int8 ? (float*)value_scale->mutable_data_ptr() : nullptr,
      .heads = {queries, kv, queries / kv, dim},
      .num_tokens = tokens,
      .num_slots = num_slots,
      .bfloat16 = bfloat16,
      .int8 = int8,
      .kernels = find_kernels(variant),
  };
  const Plan plan = make_plan((const int64_t*)table.const_data_ptr(), table.numel(), tokens, num_slots);
  Tensor out = empty_like(qkv, {tokens, queries, dim});
  store_tokens(step);
  attend(step, plan, out.mutable_data_ptr());
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def(
      "attend_rows(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor(c!)? key_scale, Tensor(d!)? value_scale, Tensor table, str variant) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) { m.impl("attend_rows", TORCH_BOX(&attend_rows)); }

}  // namespace llama
