// How activations become integers and how the products read them, written once over a format's `Sum` and included by
// every instruction-set file inside its own namespace.

// The largest magnitude of a group; not a number where one of them is not.
template <int group>
inline float peak_of(const float* x) {
  int32_t bits[group], largest = 0;
  std::memcpy(bits, x, sizeof bits);
  for (int i = 0; i < group; ++i) largest = std::max(largest, bits[i] & 0x7fffffff);
  float peak;
  std::memcpy(&peak, &largest, 4);
  return peak;
}

// A group: x * (127 / peak), rounded to even, into its place, which is `row` of `rows` from the group `at` on. A group
// of zeros, or too small to divide by, gets scale 0. Returns the scale; `whole` gets the codes as numbers.
template <class Format>
float round_group(const float* x, float peak, int64_t at, int64_t row, int64_t rows, const Rounded& to, float* whole) {
  using Code = typename Format::Sum::Code;
  constexpr int group = Format::group_size, step = Format::step_size, steps = group / step;
  const int32_t offset = Format::bytes ? Simd::byte_offset : Format::offset;
  const auto inverse = Simd::all(peak > 1e-30f ? 127.0f / peak : 0.0f);
  const float scale = peak <= 1e-30f ? 0.0f : peak / 127.0f;  // not a number stays so
  to.scale[at + row] = scale;
  for (int s = 0; s < steps; ++s) {
    auto sum = Simd::all(0);
    for (int i = s * step; i < (s + 1) * step; i += kTile) {
      const auto codes = Simd::round(Simd::multiply(Simd::numbers(x + i), inverse));
      sum = Simd::add(sum, codes);
      Format::Sum::store((Code*)to.codes + (at + row) * group + i, codes);
      Simd::store(whole + i, Simd::to_float(codes));
    }
    int32_t lanes[kTile], sums[4] = {};  // of every fourth column
    std::memcpy(lanes, &sum, sizeof lanes);
    for (int i = 0; i < kTile; ++i) sums[i % 4] += lanes[i];
    const int64_t place = at * steps + s * rows + row;
    to.start[place] = Format::Sum::start(-offset * (sums[0] + sums[1]), -offset * (sums[2] + sums[3]));
    to.sum[place] = scale * (sums[0] + sums[1] + sums[2] + sums[3]);
  }
  return scale;
}

template <class Format>
void quantize(const float* x, int64_t first, int64_t count, const Activations& a) {
  constexpr int block = Format::block, group = Format::group_size, num_groups = block / group;
  const int64_t blocks = a.columns / block, groups = a.columns / group;
  for (int64_t m = 0; m < count; ++m, x += a.columns) {
    float* peaks = a.whole.scale + first * groups + m;  // each until its group's scale takes its place
    float sum = 0;
    for (int64_t g = 0; g < groups; ++g) sum += peaks[g * count] = peak_of<group>(x + g * group);
    const float most = kStandsOut * sum / blocks;
    int64_t rest = (first + m) * groups;
    int32_t* rest_blocks = a.rest_blocks + (first + m) * (blocks + 1);
    for (int64_t b = 0; b < blocks; ++b) {
      float whole[group], left[block], of_block = 0;
      for (int i = 0; i < num_groups; ++i) of_block += peaks[(b * num_groups + i) * count];
      const bool stands_out = of_block > most;
      for (int i = 0; i < num_groups; ++i) {
        const int64_t g = b * num_groups + i;
        const float* from = x + g * group;
        const float scale =
            round_group<Format>(from, peaks[g * count], first * groups + g * count, m, count, a.whole, whole);
        if (stands_out)
          for (int c = 0; c < group; ++c) left[i * group + c] = from[c] - whole[c] * scale;
      }
      if (!stands_out) continue;
      for (int i = 0; i < num_groups; ++i, ++rest)
        round_group<Format>(left + i * group, peak_of<group>(left + i * group), rest, 0, 1, a.rest, whole);
      *rest_blocks++ = (int32_t)b;
    }
    *rest_blocks = (int32_t)blocks;
  }
}

template <class Format, int num_rows>
struct Bundle {  // the activations that one block of weights meets
  using Code = typename Format::Sum::Code;
  static constexpr int rows = num_rows;
  const Code* x;
  const float *scales, *sums;
  const int32_t* starts;

  Bundle(const Rounded& a, int64_t before) {  // before: how many numbers come before
    x = (const Code*)a.codes + before, scales = a.scale + before / Format::group_size;
    starts = a.start + before / Format::step_size, sums = a.sum + before / Format::step_size;
  }
  void next() {
    x += rows * Format::block, scales += rows * (Format::block / Format::group_size);
    starts += rows * (Format::block / Format::step_size), sums += rows * (Format::block / Format::step_size);
  }
  inline LLAMA_INLINE const Code* codes(int m, int g) const { return x + (g * rows + m) * Format::group_size; }
  inline LLAMA_INLINE float scale(int m, int g) const { return scales[g * rows + m]; }
  inline LLAMA_INLINE int32_t start(int m, int s) const { return starts[s * rows + m]; }
  inline LLAMA_INLINE float sum(int m, int s) const { return sums[s * rows + m]; }
};

template <class Format>
struct WithRest {  // a row, and what its rounding left as if that were another
  static constexpr int rows = 2;
  const Bundle<Format, 1>&whole, &rest;

  inline LLAMA_INLINE auto* codes(int m, int g) const { return (m ? rest : whole).codes(0, g); }
  inline LLAMA_INLINE float scale(int m, int g) const { return (m ? rest : whole).scale(0, g); }
  inline LLAMA_INLINE int32_t start(int m, int s) const { return (m ? rest : whole).start(0, s); }
  inline LLAMA_INLINE float sum(int m, int s) const { return (m ? rest : whole).sum(0, s); }
};

template <class Bundle, int num_rows>
struct RowsOf {  // some of a bundle's rows
  static constexpr int rows = num_rows;
  const Bundle& bundle;
  const int from;

  inline LLAMA_INLINE auto* codes(int m, int g) const { return bundle.codes(from + m, g); }
  inline LLAMA_INLINE float scale(int m, int g) const { return bundle.scale(from + m, g); }
  inline LLAMA_INLINE int32_t start(int m, int s) const { return bundle.start(from + m, s); }
  inline LLAMA_INLINE float sum(int m, int s) const { return bundle.sum(from + m, s); }
};
