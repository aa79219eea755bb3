// torch.ops.llama.lowbit_rows: some rows of a packed table as numbers, on CPU.
//
// Rows are put side by side, block by block, as the kernels read them, and turned into numbers by those. All but nf4's,
// whose levels are rounded, are those of the published format to the last bit: each is one sum, rounded once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "layout.h"
#include "lowbit.h"
#include "team.h"
#include "tensors.h"
#include "text.h"

namespace llama {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlocksPerThread = 512;  // of 16 rows: less is not worth waking a thread for

// table: uint8 (rows, bytes) in the published layout; rows: int64 (n); fields: see `fields_of`; -> float32 (n, columns)
Tensor lowbit_rows(Tensor table, Tensor rows, Text format, std::vector<int64_t> fields) {
  const Kernel* kernel = best_kernel(format);
  STD_TORCH_CHECK(kernel, "lowbit_rows has no kernel for '", format, "'");
  const std::vector<Field> of_block = fields_of(fields);
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Byte && table.is_contiguous() &&
                      table.size(1) % kernel->block_bytes == 0,
                  "lowbit_rows takes a table of uint8 rows of whole blocks");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long && rows.is_contiguous(),
                  "lowbit_rows takes the rows' numbers as int64");
  const int64_t count = rows.size(0), row_bytes = table.size(1), blocks = row_bytes / kernel->block_bytes;
  const auto* first = (const uint8_t*)table.const_data_ptr();
  std::vector<const uint8_t*> chosen;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = ((const int64_t*)rows.const_data_ptr())[i];
    STD_TORCH_CHECK(0 <= row && row < table.size(0), "row ", row, " is not in the table");
    chosen.push_back(first + row * row_bytes);
  }
  const int64_t columns = blocks * kernel->block, tiles = (count + kTile - 1) / kTile;
  chosen.resize(tiles * kTile, first);  // any row fills the last tile up
  Tensor out = empty_floats({count, columns});
  auto* numbers = (float*)out.mutable_data_ptr();
  share(tiles * blocks, kBlocksPerThread, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> packed(kTile * kernel->block_bytes);
    std::vector<float> columns_of(kTile * kernel->block);  // [column][row]
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / blocks, block = i % blocks, last = std::min(kTile, count - tile * kTile);
      uint8_t* to = packed.data();
      for (const Field& field : of_block) {
        interleave(field, &chosen[tile * kTile], block * kernel->block_bytes, to);
        to += kTile * field.size;
      }
      kernel->dequantize(packed.data(), 1, 0, 1, 0, kTile, columns_of.data());
      for (int64_t row = 0; row < last; ++row)
        for (int64_t column = 0; column < kernel->block; ++column)
          numbers[(tile * kTile + row) * columns + block * kernel->block + column] = columns_of[column * kTile + row];
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llama, m) {
  m.def("lowbit_rows(Tensor table, Tensor rows, str format, int[] fields) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llama, CPU, m) { m.impl("lowbit_rows", TORCH_BOX(&lowbit_rows)); }

}  // namespace llama
