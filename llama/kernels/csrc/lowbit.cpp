// torch.ops.llama.lowbit_linear: y = x @ weight.T + bias with a packed weight, on CPU.
//
// Two ways. The integer kernels round the activations to int8 per group of columns, the largest of them twice, and read
// the packed weight once: a few rows run at the speed of memory. "tiles" writes some hundred weight rows at a time as
// numbers into a small buffer and leaves the product to the matrix library (oneDNN: AMX where the processor has it); it
// rounds no activations.
//
// Built on torch's stable C interface: one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lowbit.h"
#include "operators.h"
#include "processor.h"
#include "team.h"
#include "tensors.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llama {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kTilesTogether = 4;        // weight tiles that no two threads share, where there are many rows
constexpr int64_t kBytesPerThread = 16384;   // of packed weights: less is not worth waking a thread for
constexpr int64_t kNumbersPerThread = 8192;  // of activations to round: the same
constexpr int64_t kPanel = 32;      // tiles that "tiles" turns into numbers at a time: 512 weight rows
constexpr int64_t kManyRows = 192;  // from here on AMX in bfloat16 should outrun AVX-512 in int8

bool has_amx_bfloat16() {
#if defined(__x86_64__)
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
#else
  return false;
#endif
}

// None where the processor lacks the instructions.
std::span<const NamedKernel> kernels_for(const std::string& instructions) {
#if defined(__x86_64__)
  if (instructions == "avx512_vnni" && has_avx512()) return avx512::kernels();
  if (instructions == "avx2" && has_avx2()) return avx2::kernels();
#endif
  return instructions == "scalar" ? scalar::kernels() : std::span<const NamedKernel>();
}

const Kernel* find_kernel(const std::string& instructions, const std::string& format) {
  for (const auto& entry : kernels_for(instructions))
    if (format == entry.format) return &entry.kernel;
  return nullptr;
}

const std::string& best_instructions() {
  static const std::string best = has_avx512() ? "avx512_vnni" : has_avx2() ? "avx2" : "scalar";
  return best;
}

struct Shape {
  int64_t rows, columns, outputs, tiles;  // activation rows; weight columns, rows, and tiles of 16 rows
};

template <class T>
std::unique_ptr<T[]> uninitialized(int64_t count) { return std::unique_ptr<T[]>(new T[count]); }

// Hands out parts of one piece of memory.
struct Memory {
  char* free;

  template <class T>
  void take(T*& part, int64_t count) {
    part = (T*)free;
    free += count * sizeof(T);
  }
};

void take(const Kernel& kernel, Memory& memory, Rounded& part, int64_t numbers) {
  memory.take(part.scale, numbers / kernel.group);
  memory.take(part.start, numbers / kernel.step);
  memory.take(part.sum, numbers / kernel.step);
  char* codes;
  memory.take(codes, numbers * kernel.code_bytes);
  part.codes = codes;
}

// One block of one row, from a bundle of that row alone, to its place in a bundle of max_rows.
void gather(const Kernel& kernel, const Rounded& from, int64_t piece, const Rounded& to, int64_t bundle, int64_t m) {
  const int64_t groups = kernel.block / kernel.group, steps = kernel.block / kernel.step, rows = kernel.max_rows;
  const int64_t code_bytes = kernel.group * kernel.code_bytes;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t source = piece * groups + g, target = (bundle * groups + g) * rows + m;
    to.scale[target] = from.scale[source];
    std::memcpy((char*)to.codes + target * code_bytes, (const char*)from.codes + source * code_bytes, code_bytes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    to.start[(bundle * steps + s) * rows + m] = from.start[piece * steps + s];
    to.sum[(bundle * steps + s) * rows + m] = from.sum[piece * steps + s];
  }
}

// What rounding left of the rows, by blocks. `memory` will own it.
Gathered gather(const Kernel& kernel, const Activations& a, std::unique_ptr<char[]>& memory) {
  const int64_t blocks = a.columns / kernel.block, runs = (a.rows + kMaxRows - 1) / kMaxRows * blocks;
  auto firsts = uninitialized<int32_t>(runs + 1);
  std::fill_n(firsts.get(), runs + 1, 0);
  for (int64_t row = 0; row < a.rows; ++row)
    for (const int32_t* block = a.rest_blocks + row * (blocks + 1); *block < blocks; ++block)
      ++firsts[row / kMaxRows * blocks + *block];
  int32_t bundles = 0;
  for (int64_t run = 0; run <= runs; ++run) {
    const int32_t more = (firsts[run] + kernel.max_rows - 1) / kernel.max_rows;
    firsts[run] = bundles;
    bundles += more;
  }
  const int64_t rows = bundles * kernel.max_rows, numbers = rows * kernel.block;
  const int64_t bytes = numbers * kernel.code_bytes + 4 * (numbers / kernel.group + 2 * numbers / kernel.step);
  memory = uninitialized<char>(bytes + 4 * (rows + 2 * runs + 1));
  std::memset(memory.get(), 0, bytes);
  Memory free{memory.get()};
  Gathered out;
  take(kernel, free, out, numbers);
  free.take(out.rows, rows);
  free.take(out.first, runs + 1);
  int32_t* found;  // of each run
  free.take(found, runs);
  std::fill_n(out.rows, rows, (int32_t)kMaxRows);
  std::copy_n(firsts.get(), runs + 1, out.first);
  std::fill_n(found, runs, 0);
  for (int64_t row = 0; row < a.rows; ++row) {
    int64_t piece = row * blocks;
    for (const int32_t* block = a.rest_blocks + row * (blocks + 1); *block < blocks; ++block, ++piece) {
      const int64_t run = row / kMaxRows * blocks + *block, place = out.first[run] * kernel.max_rows + found[run]++;
      out.rows[place] = row % kMaxRows;
      gather(kernel, a.rest, piece, out, place / kernel.max_rows, place % kernel.max_rows);
    }
  }
  return out;
}

// Rounds x to int8, in places twice. `memory` will own what the result points to.
Activations quantize(const Kernel& kernel, const Shape& s, const void* x, bool bfloat16,
                     std::unique_ptr<char[]>& memory) {
  const int64_t numbers = s.rows * s.columns, rest_blocks = numbers / kernel.block + s.rows;
  const int64_t bytes = numbers * kernel.code_bytes + 4 * (numbers / kernel.group + 2 * numbers / kernel.step);
  memory = uninitialized<char>(2 * bytes + 4 * rest_blocks);
  Memory free{memory.get()};
  Activations a{s.rows, s.columns};
  take(kernel, free, a.whole, numbers);
  take(kernel, free, a.rest, numbers);
  free.take(a.rest_blocks, rest_blocks);
  auto bundles = [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kernel.max_rows, s.rows);
    auto floats = uninitialized<float>(bfloat16 ? std::min(kernel.max_rows, s.rows) * s.columns : 0);
    for (int64_t first = begin * kernel.max_rows; first < last;) {
      const int64_t count = bundle_rows(kernel.max_rows, s.rows - first);
      const float* from = (const float*)x + first * s.columns;
      if (bfloat16) {
        const auto* halves = (const uint16_t*)x + first * s.columns;
        for (int64_t i = 0; i < count * s.columns; ++i) floats[i] = from_bfloat16(halves[i]);
        from = floats.get();
      }
      kernel.quantize(from, first, count, a);
      first += count;
    }
  };
  const int64_t count = (s.rows + kernel.max_rows - 1) / kernel.max_rows;
  share(count, count * kNumbersPerThread / numbers, bundles);
  return a;
}

using Results = float[kMaxTiles][kMaxRows * kTile];

// Some tiles' results for `count` rows, with the bias, into their places in `out` (rows, outputs).
void write_results(const Kernel& kernel, const Shape& s, Results& results, int64_t tile, int64_t num_tiles,
                   int64_t first, int64_t count, const float* bias, bool bfloat16, void* out) {
  const int64_t column = tile * kTile, outputs = std::min(num_tiles * kTile, s.outputs - column);
  if (bias)
    for (int64_t t = 0; t < num_tiles; ++t, bias += kTile)
      for (int64_t m = 0; m < count; ++m)
        for (int64_t lane = 0; lane < std::min(kTile, outputs - t * kTile); ++lane)
          results[t][m * kTile + lane] += bias[column + lane];
  const int64_t whole = bfloat16 ? outputs / kTile : 0, place = first * s.outputs + column;
  if (whole) kernel.write_bfloat16(results[0], whole, count, s.outputs, (uint16_t*)out + place);
  for (int64_t t = whole; t < num_tiles; ++t) {
    const float* from = results[t];
    const int64_t lanes = std::min(kTile, outputs - t * kTile);
    for (int64_t at = place + t * kTile, m = 0; m < count; ++m, at += s.outputs, from += kTile) {
      if (bfloat16) {
        for (int64_t lane = 0; lane < lanes; ++lane) ((uint16_t*)out)[at + lane] = to_bfloat16(from[lane]);
      } else if (lanes == kTile) {
        std::memcpy((float*)out + at, from, kTile * sizeof(float));  // of a size that is known: four moves
      } else {
        std::copy_n(from, lanes, (float*)out + at);
      }
    }
  }
}

void integer_product(const Kernel& kernel, const Shape& s, const uint8_t* packed, int64_t packed_bytes, const void* x,
                     const float* bias, bool bfloat16, void* out) {
  std::unique_ptr<char[]> memory, gathered;
  Activations a = quantize(kernel, s, x, bfloat16, memory);
  if (s.rows > 1 || kernel.max_rows == 1) a.gathered = gather(kernel, a, gathered);
  const int64_t together = s.rows == 1 ? 1 : kTilesTogether, parts = (s.tiles + together - 1) / together;
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread * parts / packed_bytes);
  share(parts, grain, [&](int64_t begin, int64_t end) {
    alignas(64) Results results;
    const int64_t last_tile = std::min(end * together, s.tiles);
    for (int64_t first = 0, count; first < s.rows; first += count) {
      count = std::min(kMaxRows, s.rows - first);
      for (int64_t tile = begin * together, some; tile < last_tile; tile += some) {
        some = std::min(kernel.max_tiles, last_tile - tile);
        kernel.product(packed, s.tiles, tile, some, a, first, count, results[0]);
        write_results(kernel, s, results, tile, some, first, count, bias, bfloat16, out);
      }
    }
  });
}

void tiled_product(const Kernel& kernel, const Shape& s, const uint8_t* packed, const Tensor& x,
                   const std::optional<Tensor>& bias, bool bfloat16, Tensor out) {
  const int64_t panel = std::min(kPanel, s.tiles);
  Tensor numbers = empty_like(x, {s.columns * panel * kTile});
  for (int64_t tile = 0; tile < s.tiles; tile += panel) {
    const int64_t count = std::min(panel, s.tiles - tile), width = count * kTile;
    void* to = numbers.mutable_data_ptr();
    const int64_t blocks = s.columns / kernel.block;
    share(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = block * kernel.block * width + i * kTile;
          if (bfloat16) {
            kernel.dequantize_bfloat16(packed, s.tiles, tile + i, blocks, block, width, (uint16_t*)to + at);
          } else {
            kernel.dequantize(packed, s.tiles, tile + i, blocks, block, width, (float*)to + at);
          }
        }
      }
    });
    Tensor weight = torch::stable::narrow(numbers, 0, 0, s.columns * width);
    Tensor product = torch::stable::matmul(x, torch::stable::view(weight, {s.columns, width}));
    const int64_t lanes = std::min(width, s.outputs - tile * kTile);
    Tensor part = torch::stable::narrow(out, 1, tile * kTile, lanes);
    torch::stable::copy_(part, torch::stable::narrow(product, 1, 0, lanes));
  }
  if (bias) {  // x is two-dimensional and contiguous, so that rows follow one another
    const auto* add = (const float*)bias->const_data_ptr();
    void* y = out.mutable_data_ptr();
    for (int64_t i = 0; i < s.rows * s.outputs; ++i) {
      if (bfloat16) {
        auto* at = (uint16_t*)y + i;
        *at = to_bfloat16(from_bfloat16(*at) + add[i % s.outputs]);
      } else {
        ((float*)y)[i] += add[i % s.outputs];
      }
    }
  }
}

}  // namespace

const Kernel* best_kernel(const std::string& format) { return find_kernel(best_instructions(), format); }

// x (..., columns) bfloat16 or float32; packed: interleaved bytes; bias float32 (outputs); -> (..., outputs) as x.
Tensor lowbit_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, Text format, int64_t outputs, Text variant) {
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bfloat16 || x.scalar_type() == ScalarType::Float, "lowbit_linear takes bfloat16 or float32");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0 && packed.is_contiguous(), "lowbit_linear takes rows of numbers");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t columns = x.size(-1);
  const Shape s{x.numel() / columns, columns, outputs, (outputs + kTile - 1) / kTile};
  if (variant == "auto")
    variant = bfloat16 && s.rows >= kManyRows && has_amx_bfloat16() ? "tiles" : best_instructions();
  const Kernel* kernel = find_kernel(variant == "tiles" ? best_instructions() : variant, format);
  STD_TORCH_CHECK(kernel, "lowbit_linear: this machine has no kernel '", variant, "' for '", format, "'");
  STD_TORCH_CHECK(columns % kernel->block == 0, "lowbit_linear: columns are not whole blocks");
  const int64_t blocks = s.tiles * kTile * (columns / kernel->block);
  STD_TORCH_CHECK(blocks * kernel->block_bytes == packed.numel(), "lowbit_linear: the weight has the wrong size");
  STD_TORCH_CHECK(!bias || (bias->numel() == outputs && bias->scalar_type() == ScalarType::Float),
                  "lowbit_linear: the bias is not one float32 per output");
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = outputs;
  Tensor out = empty_like(x, size);
  if (s.rows == 0 || outputs == 0) return out;

  const auto* weight = (const uint8_t*)packed.const_data_ptr();
  if (variant == "tiles") {
    tiled_product(*kernel, s, weight, torch::stable::view(x, {s.rows, columns}), bias, bfloat16,
                  torch::stable::view(out, {s.rows, outputs}));
  } else {
    integer_product(*kernel, s, weight, packed.numel(), x.const_data_ptr(),
                    bias ? (const float*)bias->const_data_ptr() : nullptr, bfloat16, out.mutable_data_ptr());
  }
  torch_multiplied(variant == "tiles");
  return out;
}

namespace {

// 1: AVX-512 with VNNI, 2: AVX2. What the processor has; the scalar kernels run everywhere.
int64_t instruction_sets() { return (has_avx512() ? 1 : 0) | (has_avx2() ? 2 : 0); }

// The low-bit formats that lowbit_linear serves.
std::vector<std::string> formats() {
  std::vector<std::string> names;
  for (const auto& entry : scalar::kernels()) names.push_back(entry.format);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY(llama, m) {
  m.def("lowbit_linear(Tensor x, Tensor packed, Tensor? bias, str format, int outputs, str variant) -> Tensor");
  m.def("instruction_sets() -> int");
  m.def("formats() -> str[]");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) {
  m.impl("lowbit_linear", TORCH_BOX(&lowbit_linear));
}
STABLE_TORCH_LIBRARY_IMPL(llama, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("formats", TORCH_BOX(&formats));
}

}  // namespace llama
