// How rows of blocks become the kernel layout, piece by piece. See layout.cpp.
#pragma once
#include <cstdint>
#include <vector>

namespace llama {

struct Field {
  int64_t start, size, unit, bit_planes;  // bytes; the last is 0 or 1
};

// From the flat list that operators take: of each field start, size, unit and bit_planes, in the kernel layout's order.
std::vector<Field> fields_of(const std::vector<int64_t>& numbers);

// That field of one block of kTile rows, which begins `block` bytes into each: [unit][row].
void interleave(const Field& field, const uint8_t* const* rows, int64_t block, uint8_t* out);

}  // namespace llama
