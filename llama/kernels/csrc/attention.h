// What the instruction-set files offer to attention.cpp: plain pointers, no torch.
#pragma once
#include <cstdint>

namespace llama {

constexpr int64_t kChunk = 256;  // tokens that are looked at together; fixed, so that a row's bits are its own

// Query rows that look at the same tokens, [row][head][head_dim] and already scaled; the `heads` share a key head. A
// row sees the first `seen[row]` of the tokens, at least one and at least as many as the row before it.
struct Queries {
  const float* numbers;
  int64_t rows, heads, head_dim;
  const int64_t* seen;
};

// A chunk's result for each row and head, before chunks are merged: values [row][head][head_dim], each weighted by
// exp(score - peak[row][head]), and the weights' sum[row][head].
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

// The tokens are those of `runs`, at most kChunk. `scores` is room for [row][head][kChunk]. What a row gets does not
// depend on the rows beside it.
using AttendChunk = void (*)(const Queries& queries, const Stored& stored, const Run* runs, float* scores,
                             Partial out);

struct AttentionKernels {
  AttendChunk bfloat16, float32, int8;
};

namespace avx512 { AttentionKernels attention(); }
namespace avx2 { AttentionKernels attention(); }
namespace scalar { AttentionKernels attention(); }

}  // namespace llama
