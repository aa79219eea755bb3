// x a^T b for a few rows x, written once over `Simd` and included by every instruction-set file inside its own
// namespace. Arithmetic is float32. Each number of `a` and `b` is read once for up to four rows; how many rows there
// are does not change the order of any row's sums.

// f(Index<n>(), first) for bundles of n rows, which begin at `first`.
template <class F>
inline LLAMA_INLINE void in_bundles(int64_t rows, F&& f) {
  int64_t first = 0;
  for (; first + 4 <= rows; first += 4) f(Index<4>(), first);
  if (rows - first >= 2) f(Index<2>(), first), first += 2;
  if (rows - first >= 1) f(Index<1>(), first);
}

// h[i * stride + r] = x[i] . a[r]
template <class T, int rows, int ranks, bool ahead = true>
inline LLAMA_INLINE void dots(const float* x, int64_t columns, const T* a, float* h, int64_t stride) {
  typename Simd::Floats sum[rows * ranks];
  LLAMA_UNROLL for (int i = 0; i < rows * ranks; ++i) sum[i] = Simd::all(0.0f);
  for (int64_t d = 0; d < columns; d += kTile) {
    typename Simd::Floats weight[ranks];
    LLAMA_UNROLL for (int r = 0; r < ranks; ++r) {
      const T* at = a + r * columns + d;
      weight[r] = ahead ? read_ahead(at) : Simd::numbers(at);
    }
    LLAMA_UNROLL for (int i = 0; i < rows; ++i) {
      const auto v = Simd::numbers(x + i * columns + d);
      LLAMA_UNROLL for (int r = 0; r < ranks; ++r) sum[i * ranks + r] = Simd::fma(weight[r], v, sum[i * ranks + r]);
    }
  }
  LLAMA_UNROLL for (int i = 0; i < rows * ranks; ++i) h[i / ranks * stride + i % ranks] = Simd::sum(sum[i]);
}

template <class T>
void project(const float* x, int64_t rows, int64_t columns, const T* a, int64_t ranks, float* h, int64_t stride) {
  in_bundles(rows, [&](auto count, int64_t first) {
    constexpr int n = count, together = std::max(1, std::min(4, Simd::num_sums / n));  // sums fit in the registers
    const float* from = x + first * columns;
    float* to = h + first * stride;
    int64_t r = 0;
    for (; r + together <= ranks; r += together) dots<T, n, together>(from, columns, a + r * columns, to + r, stride);
    for (; r < ranks; ++r) dots<T, n, 1>(from, columns, a + r * columns, to + r, stride);
  });
}

template <class T, class Y>
void expand(const float* h, int64_t stride, int64_t rows, int64_t ranks, const T* b, int64_t panels, Y* y,
            int64_t outputs) {
  in_bundles(rows, [&](auto count, int64_t first) {
    constexpr int n = count;
    const T* weight = b;
    for (int64_t panel = 0; panel < panels; ++panel) {
      Y* to = y + first * outputs + panel * kTile;
      typename Simd::Floats sum[n];
      LLAMA_UNROLL for (int i = 0; i < n; ++i) sum[i] = Simd::numbers(to + i * outputs);
      for (int64_t r = 0; r < ranks; ++r, weight += kTile) {
        const auto w = read_ahead(weight);
        LLAMA_UNROLL for (int i = 0; i < n; ++i) sum[i] = Simd::fma(w, Simd::all(h[(first + i) * stride + r]), sum[i]);
      }
      LLAMA_UNROLL for (int i = 0; i < n; ++i) Simd::store(to + i * outputs, sum[i]);
    }
  });
}

template <class T>
LowRankKernels<T> low_rank_kernels() { return {project<T>, expand<T, float>, expand<T, uint16_t>}; }
