// torch.ops.llama.to_tiles: packed rows into the kernel layout, 16 of them side by side (llama/kernels/lowbit.py).
//
// It copies units of one to four bytes. PyTorch's copy spends ten times as long on loops of 16 steps.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "lowbit.h"
#include "tensors.h"

namespace llama {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytesPerThread = 1 << 22;  // less is not worth waiting for another thread on a busy machine

struct Field {
  int64_t start, size, unit, bit_planes;  // bytes; the last is 0 or 1
};

// One bit a column, 32 of them: byte c gets columns c, c + 4, ... c + 28.
uint32_t planes(uint32_t bits) {
  uint32_t out = 0;
  for (int c = 0; c < 4; ++c)
    for (int j = 0; j < 8; ++j) out |= (bits >> (c + 4 * j) & 1) << (8 * c + j);
  return out;
}

// One field of a block of 16 rows, `at` bytes into each: [unit][row].
template <class Unit, bool bit_planes = false>
void interleave(const uint8_t* const* rows, int64_t at, int64_t size, uint8_t* out) {
  for (int64_t i = 0; i < size; i += sizeof(Unit)) {
    for (int64_t row = 0; row < kTile; ++row, out += sizeof(Unit)) {
      Unit unit;
      std::memcpy(&unit, rows[row] + at + i, sizeof(Unit));
      if constexpr (bit_planes) unit = planes(unit);
      std::memcpy(out, &unit, sizeof(Unit));
    }
  }
}

auto interleave_of(const Field& field) {
  if (field.bit_planes) return &interleave<uint32_t, true>;
  if (field.unit == 4) return &interleave<uint32_t>;
  return field.unit == 2 ? &interleave<uint16_t> : &interleave<uint8_t>;
}

// Reading weights from large pages is a fifth faster. Nothing has been written to them yet.
void ask_for_large_pages(void* memory, int64_t size) {
  constexpr uintptr_t page = 4096;
  const auto begin = ((uintptr_t)memory + page - 1) / page * page, end = ((uintptr_t)memory + size) / page * page;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: it may be declined
}

// parts: uint8 (rows, bytes), one below the other. fields: start, size, unit and bit_planes of each, in the order of
// the kernel layout.
Tensor to_tiles(std::vector<Tensor> parts, std::vector<int64_t> fields, int64_t block_bytes) {
  STD_TORCH_CHECK(!parts.empty() && fields.size() % 4 == 0 && block_bytes > 0, "to_tiles takes rows of blocks");
  const int64_t row_bytes = parts[0].size(-1), blocks = row_bytes / block_bytes;
  std::vector<const uint8_t*> rows;
  for (auto& part : parts) {
    STD_TORCH_CHECK(part.dim() == 2 && part.size(1) == row_bytes && part.scalar_type() == ScalarType::Byte &&
                        row_bytes % block_bytes == 0,
                    "to_tiles takes uint8 rows of whole blocks, all of one length");
    if (!part.is_contiguous()) part = torch::stable::contiguous(part);
    const auto* first = (const uint8_t*)part.const_data_ptr();
    for (int64_t row = 0; row < part.size(0); ++row) rows.push_back(first + row * row_bytes);
  }
  const std::vector<uint8_t> zeros(row_bytes);
  const int64_t tiles = ((int64_t)rows.size() + kTile - 1) / kTile;
  rows.resize(tiles * kTile, zeros.data());

  Tensor tiled = empty_like(parts[0], {tiles * kTile * row_bytes});
  auto* out = (uint8_t*)tiled.mutable_data_ptr();
  ask_for_large_pages(out, tiled.numel());
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, kTile * row_bytes));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    int64_t region = 0;
    for (size_t i = 0; i < fields.size(); i += 4) {
      const Field field{fields[i], fields[i + 1], fields[i + 2], fields[i + 3]};
      const auto copy = interleave_of(field);
      for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t block = 0; block < blocks; ++block)
          copy(&rows[tile * kTile], block * block_bytes + field.start, field.size,
               out + region + (tile * blocks + block) * kTile * field.size);
      region += tiles * blocks * kTile * field.size;
    }
  });
  return tiled;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def("to_tiles(Tensor[] parts, int[] fields, int block_bytes) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) {
  m.impl("to_tiles", TORCH_BOX(&to_tiles));
}

}  // namespace llama
