// A few rows times plain weights, written once over `Simd` and included by every instruction-set file inside its own
// namespace, behind lowrank_kernels.h. Arithmetic is float32; a row's sums are made in one order, whatever the others.

// Up to four rows: one row of the weight after the other, as memory is read fastest, without fetching ahead, which
// costs where there is one stream. More rows: four rows of the weight, which stay in the cache, for each row.
template <class T>
void dense_product(const float* x, int64_t rows, int64_t columns, const T* weight, int64_t outputs, float* y,
                   int64_t stride) {
  constexpr int together = 4;
  int64_t o = 0;
  for (; rows > together && o + together <= outputs; o += together) {
    const T* from = weight + o * columns;
    for (int64_t i = 0; i < rows; ++i)
      dots<T, 1, together, false>(x + i * columns, columns, from, y + i * stride + o, stride);
  }
  for (; o < outputs; ++o) {
    in_bundles(rows, [&](auto count, int64_t first) {
      dots<T, count, 1, false>(x + first * columns, columns, weight + o * columns, y + first * stride + o, stride);
    });
  }
}
