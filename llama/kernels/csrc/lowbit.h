// What the instruction-set files offer and what lowbit.cpp calls: plain pointers, no torch.
#pragma once
#include <cstdint>
#include <span>
#include <string>

// A kernel is one function without small loops: its values live in registers.
#define LLAMA_INLINE __attribute__((always_inline))
#define LLAMA_UNROLL _Pragma("GCC unroll 16")

namespace llama {

constexpr int64_t kTile = 16;    // weight rows side by side: the 32-bit lanes of a 512-bit register
constexpr int64_t kMaxRows = 128;  // most activation rows that meet one weight tile in one call
constexpr int64_t kMaxTiles = 3;   // most tiles that one call multiplies
constexpr int64_t kPrefetch = 8192;  // bytes ahead of each load: hardware prefetchers lose several streams at once

// nf4's levels times 32639 as 256 * high + low: products stay in integers, to 15 bits of each level. `low` is signed
// where `Carry`, else it counts from 0 to 255.
struct Levels {
  alignas(16) int8_t high[16], low[16];
};
template <bool Carry>
constexpr Levels nf4_levels() {
  constexpr int levels[16] = {-32639, -22723, -17138, -12890, -9284, -6031, -2972, 0,
                              2597,   5253,   8033,   11029,  14384, 18363, 23597, 32639};
  Levels out{};
  for (int i = 0; i < 16; ++i) {
    const int low = Carry ? ((levels[i] + 128) & 255) - 128 : levels[i] & 255;
    out.high[i] = (int8_t)((levels[i] - low) / 256);
    out.low[i] = (int8_t)low;
  }
  return out;
}
constexpr Levels kNf4 = nf4_levels<true>();

// The next bundle's rows of `left` activation rows: a power of two, so that there is a kernel for every bundle.
inline int64_t bundle_rows(int64_t most, int64_t left) {
  while (most > left) most /= 2;
  return most;
}

// A block is rounded twice where its peak, the largest magnitude, is above so many times the mean of the row's peaks.
// Of SmolLM2's blocks a tenth is, and the model's error a quarter of what it was.
constexpr float kStandsOut = 2.0f;

// Numbers rounded to int8, one scale per group of columns.
struct Rounded {
  void* codes;     // [group][row][column], in the type and order that the kernel's sums take
  float* scale;    // [group][row]: x = code * scale
  int32_t* start;  // [step][row]: -offset * sum of codes, where a product starts, so that weights may stay unsigned
  float* sum;      // [step][row]: scale * sum of codes, what a weight step's minimum is multiplied by
};

// What rounding left of many rows, block by block: for each kMaxRows rows and each block the bundles of those that have
// it, filled up with zeros.
struct Gathered : Rounded {
  int32_t* first;  // [kMaxRows rows][block]: its first bundle, and behind them the number of bundles
  int32_t* rows;   // [bundle][row]: which of the kMaxRows rows; kMaxRows where it is filled up
};

// Activations: `whole` is all of them; its rows lie in bundles, and inside a bundle everything is ordered [group][row],
// so that a kernel walks it from front to back. `rest` is what that rounding left of the blocks that stand out, rounded
// in its turn: row by row, with room for all blocks, of which it has `rest_blocks`.
struct Activations {
  int64_t rows, columns;
  Rounded whole, rest;
  int32_t* rest_blocks;  // [row][blocks + 1]: which blocks, in order, and behind them the number of blocks
  Gathered gathered;
};

// One format's kernels for one instruction set. `packed` is the interleaved layout of `tiles` tiles.
struct Kernel {
  int64_t block, group, step;  // columns: of a block, of an activation scale, of a weight's minimum or whole step
  int64_t block_bytes, code_bytes;
  int64_t max_rows;  // of a bundle: a power of two
  int64_t max_tiles;  // that are multiplied side by side
  // Round `count` rows of floats at x (a bundle) into `a` at its row `first`.
  void (*quantize)(const float* x, int64_t first, int64_t count, const Activations& a);
  // out[t][row][lane] for activation rows first..first + count, where a bundle begins and one ends, up to kMaxRows, and
  // up to max_tiles weight tiles from `tile` on; each has kMaxRows rows of room.
  void (*product)(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t num_tiles, const Activations& a,
                  int64_t first, int64_t count, float* out);
  // One block of a tile as numbers, transposed: out[column * stride + lane].
  void (*dequantize)(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block, int64_t stride,
                     float* out);
  void (*dequantize_bfloat16)(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block,
                              int64_t stride, uint16_t* out);
  // out[row * stride + t * kTile + lane] = sums[t][row][lane], rounded: a row's tiles together fill lines of memory
  void (*write_bfloat16)(const float* sums, int64_t num_tiles, int64_t count, int64_t stride, uint16_t* out);
};

struct NamedKernel {
  const char* format;
  Kernel kernel;
};

// One for each format, the same formats everywhere. avx512 and avx2 exist on x86-64 only.
namespace avx512 { std::span<const NamedKernel> kernels(); }
namespace avx2 { std::span<const NamedKernel> kernels(); }
namespace scalar { std::span<const NamedKernel> kernels(); }

// Of the widest instructions that this processor has; none for a format that is not served.
const Kernel* best_kernel(const std::string& format);

}  // namespace llama
