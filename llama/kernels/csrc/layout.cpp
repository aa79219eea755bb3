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

#include "layout.h"
#include "lowbit.h"
#include "tensors.h"

namespace llama {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytesPerThread = 1 << 22;  // less is not worth waiting for another thread on a busy machine

// One bit a column, 32 of them: byte c gets columns c, c + 4, ... c + 28.
uint32_t planes(uint32_t bits) {
  uint32_t out = 0;
  for (int c = 0; c < 4; ++c)
    for (int j = 0; j < 8; ++j) out |= (bits >> (c + 4 * j) & 1) << (8 * c + j);
  return out;
}

template <class Unit, bool bit_planes = false>
void interleave_units(const uint8_t* const* rows, int64_t at, int64_t size, uint8_t* out) {
  for (int64_t i = 0; i < size; i += sizeof(Unit)) {
    for (int64_t row = 0; row < kTile; ++row, out += sizeof(Unit)) {
      Unit unit;
      std::memcpy(&unit, rows[row] + at + i, sizeof(Unit));
      if constexpr (bit_planes) unit = planes(unit);
      std::memcpy(out, &unit, sizeof(Unit));
    }
  }
}

// Reading weights from large pages is a fifth faster. Nothing has been written to them yet.
void ask_for_large_pages(void* memory, int64_t size) {
  constexpr uintptr_t page = 4096;
  const auto begin = ((uintptr_t)memory + page - 1) / page * page, end = ((uintptr_t)memory + size) / page * page;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: it may be declined
}

}  // namespace

std::vector<Field> fields_of(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() % 4 == 0, "a field is four numbers");
  std::vector<Field> fields;
  for (size_t i = 0; i < numbers.size(); i += 4)
    fields.push_back({numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]});
  return fields;
}

void interleave(const Field& field, const uint8_t* const* rows, int64_t block, uint8_t* out) {
  const auto copy = field.bit_planes ? &interleave_units<uint32_t, true>
                    : field.unit == 4 ? &interleave_units<uint32_t>
                    : field.unit == 2 ? &interleave_units<uint16_t>
                                      : &interleave_units<uint8_t>;
  copy(rows, block + field.start, field.size, out);
}

namespace {

// parts: uint8 (rows, bytes), one below the other. fields: see `fields_of`.
Tensor to_tiles(std::vector<Tensor> parts, std::vector<int64_t> fields, int64_t block_bytes) {
  STD_TORCH_CHECK(!parts.empty() && block_bytes > 0, "to_tiles takes rows of blocks");
  const std::vector<Field> of_block = fields_of(fields);
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
    for (const Field& field : of_block) {
      for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t block = 0; block < blocks; ++block)
          interleave(field, &rows[tile * kTile], block * block_bytes,
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
