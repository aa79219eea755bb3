// What the instruction-set files offer and what lowbit.cpp calls: plain pointers, no torch.
#pragma once
#include <cstdint>
#include <string>

#define LLAMA_INLINE __attribute__((always_inline))  // a kernel is one function: its values live in registers

namespace llama {

constexpr int64_t kTile = 16;    // weight rows side by side: the 32-bit lanes of a 512-bit register
constexpr int64_t kMaxRows = 8;  // most activation rows that share one pass over a weight tile
constexpr int64_t kPrefetch = 8192;  // bytes ahead of each load: hardware prefetchers lose several streams at once

// Activations rounded to int8, one scale per group of columns. Rows lie in bundles of `Kernel::bundle(rows left)`;
// inside a bundle everything is ordered [group][row], so that a kernel walks it from front to back.
struct Activations {
  int64_t rows, columns, group;
  int8_t* codes;   // [group][row][column]
  float* scale;    // x = code * scale
  int32_t* start;  // -offset * sum of codes: where an integer product starts, so that weights may stay unsigned
  float* sum;      // scale * sum of codes: what a weight group's minimum is multiplied by
};

// One format's kernels for one instruction set. `packed` is the interleaved layout of `tiles` tiles.
struct Kernel {
  int64_t block, group, block_bytes;
  int64_t max_rows;  // of a bundle: a power of two
  int64_t bundle(int64_t left) const {
    int64_t rows = max_rows;
    while (rows > left) rows /= 2;
    return rows;
  }
  // Round `count` rows of floats at x (a bundle) into `a` at its row `first`.
  void (*quantize)(const float* x, int64_t first, int64_t count, const Activations& a);
  // out[row][lane] for one bundle (activation rows first..first + count) and one weight tile.
  void (*product)(const uint8_t* packed, int64_t tiles, int64_t tile, const Activations& a, int64_t first,
                  int64_t count, float* out);
  // One block of a tile as numbers, transposed: out[column * stride + lane].
  void (*dequantize)(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block, int64_t stride,
                     float* out);
  void (*dequantize_bfloat16)(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block,
                              int64_t stride, uint16_t* out);
};

// nullptr for a format that is not known. avx512 and avx2 exist on x86-64 only.
namespace avx512 { const Kernel* find(const std::string& format); }
namespace avx2 { const Kernel* find(const std::string& format); }
namespace scalar { const Kernel* find(const std::string& format); }

}  // namespace llama
