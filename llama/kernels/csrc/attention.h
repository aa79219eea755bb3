// What the instruction-set files offer to attention.cpp: plain pointers, no torch.
#pragma once
#include <cstdint>

namespace llama {

constexpr int64_t kChunk = 256;  // tokens that are looked at together; fixed, so that a row's bits are its own

// A chunk's result for the `group` query heads that share a key head, before chunks are merged:
// values [group][head_dim], each weighted by exp(score - peak[group]), and the weights' sum[group].
struct Partial {
  float *values, *peak, *sum;
};

struct Run {  // slots that follow one another
  int64_t slot, length;
};

// One key head's keys and values, [slot][head_dim] in a type that the kernel knows; scales [slot] of int8, or null.
struct Stored {
  const void *keys, *values;
  const float *key_scale, *value_scale;
};

// q [group][head_dim], already scaled; at most kChunk tokens in `runs`.
using AttendChunk = void (*)(const float* q, int64_t group, int64_t head_dim, const Stored& stored, const Run* runs,
                             int64_t num_runs, Partial out);

struct AttentionKernels {
  AttendChunk bfloat16, float32, int8;
};

namespace avx512 { AttentionKernels attention(); }
namespace avx2 { AttentionKernels attention(); }
namespace scalar { AttentionKernels attention(); }

}  // namespace llama
