// The kernels, written once over `Simd` (16 lanes, one weight row each) and included by every instruction-set file
// inside its own namespace. A weight operand is 64 bytes: for each of 16 rows the codes of 4 neighbouring columns.
// llama/kernels/layouts.py describes the bytes; kernel layout: field after field, each [tile][block][unit][row].

template <int i>
using Index = std::integral_constant<int, i>;

// f(Index<0>()), f(Index<1>()) ... f(Index<count - 1>()): a loop whose counter is a constant.
template <int count, class F>
inline LLAMA_INLINE void repeat(F&& f) {
  auto each = [&]<int... i>(std::integer_sequence<int, i...>) LLAMA_INLINE { (f(Index<i>()), ...); };
  each(std::make_integer_sequence<int, count>());
}

struct Block {  // one block's fields, 16 rows each
  const uint8_t* field[4];
};

// A format tells its field sizes (bytes of one row, in kernel order), each group's scale<g> and lowest<g> (its minimum),
// visit<g>(block, f), which calls f(column, codes) for the operands of group g, `column` counting from the group's
// first, and the Sum that multiplies such codes by activations.

template <int Columns, int Bits, bool HasMinimum, int ScaleBytes = 2>
struct Affine {
  static constexpr int block = Columns, group_size = Columns;
  static constexpr bool minimum = HasMinimum, bytes = Bits == 8, table = false;
  using Sum = std::conditional_t<bytes, Simd::ByteSum, Simd::CodeSum<(1 << Bits) - 1>>;
  static constexpr int offset = HasMinimum || bytes ? 0 : 1 << (Bits - 1);
  static constexpr int sizes[4] = {bytes ? Columns : Columns / 2, Bits == 5 ? Columns / 8 : 0, ScaleBytes,
                                   HasMinimum ? 2 : 0};

  template <int g, class F>
  static inline LLAMA_INLINE void visit(const Block& b, F&& f) {
    constexpr int vectors = sizes[0] / 4;
    repeat<vectors>([&](auto i) LLAMA_INLINE {
      auto codes = Simd::load(b.field[0] + 64 * i);
      if constexpr (bytes) {
        f(4 * i, codes);
      } else {
        auto low = Simd::low(codes), high = Simd::high(codes);
        if constexpr (Bits == 5) {  // a plane holds one bit of eight operands
          constexpr int next = i + vectors;
          low = Simd::template merge<1, i % 8>(low, Simd::load(b.field[1] + 64 * (i / 8)));
          high = Simd::template merge<1, next % 8>(high, Simd::load(b.field[1] + 64 * (next / 8)));
        }
        f(4 * i, low);
        f(4 * i + Columns / 2, high);
      }
    });
  }
  template <int g>
  static inline Simd::Floats scale(const Block& b) {
    if constexpr (ScaleBytes == 4) return Simd::floats(b.field[2]);
    return Simd::halves(b.field[2]);
  }
  template <int g>
  static inline Simd::Floats lowest(const Block& b) { return Simd::halves(b.field[3]); }
};

struct ZeroPoint4 : Affine<64, 4, true> {  // its minimum is minus the scale times a byte
  static constexpr int sizes[4] = {32, 0, 2, 1};

  template <int g>
  static inline Simd::Floats lowest(const Block& b) {
    return Simd::multiply(Simd::multiply(scale<g>(b), Simd::all(-1.0f)), Simd::to_float(Simd::widen(b.field[3])));
  }
};

struct NormalFloat4 {
  static constexpr int block = 64, group_size = 64, offset = 0;
  static constexpr bool minimum = false, bytes = true, table = true;
  static constexpr int sizes[4] = {32, 0, 2, 0};
  using Sum = Simd::LevelSum;

  template <int g, class F>
  static inline LLAMA_INLINE void visit(const Block& b, F&& f) {
    repeat<8>([&](auto i) LLAMA_INLINE {
      auto codes = Simd::load(b.field[0] + 64 * i);
      f(4 * i, Simd::high(codes));
      f(4 * i + 32, Simd::low(codes));
    });
  }
  template <int g>
  static inline Simd::Floats scale(const Block& b) {
    return Simd::multiply(Simd::halves(b.field[2]), Simd::all(1.0f / 32639));
  }
};

struct Q4K {
  static constexpr int block = 256, group_size = 32, offset = 0;
  static constexpr bool minimum = true, bytes = false, table = false;
  static constexpr int sizes[4] = {128, 12, 2, 2};
  using Sum = Simd::CodeSum<15>;

  template <int g, class F>
  static inline LLAMA_INLINE void visit(const Block& b, F&& f) {
    repeat<8>([&](auto i) LLAMA_INLINE {
      auto codes = Simd::load(b.field[0] + 64 * (g / 2 * 8 + i));
      f(4 * i, g % 2 ? Simd::high(codes) : Simd::low(codes));
    });
  }
  // Six bits from twelve bytes: groups 0-3 in the low bits of bytes `first` + 0..3; groups 4-7 have their low four
  // bits in bytes 8..11 (scales below, minima above) and their high two above the six of groups 0-3.
  template <int g, int first>
  static inline Simd::Floats six_bits(const Block& b) {
    auto byte = [&](int i) { return Simd::widen(b.field[1] + 16 * i); };
    if constexpr (g < 4) return Simd::to_float(Simd::mask(byte(first + g), 63));
    auto low = first ? Simd::right(byte(g + 4), 4) : Simd::mask(byte(g + 4), 15);
    return Simd::to_float(Simd::either(low, Simd::left(Simd::right(byte(first + g - 4), 6), 4)));
  }
  template <int g>
  static inline Simd::Floats scale(const Block& b) {
    return Simd::multiply(Simd::halves(b.field[2]), six_bits<g, 0>(b));
  }
  template <int g>
  static inline Simd::Floats lowest(const Block& b) {
    return Simd::multiply(Simd::multiply(Simd::halves(b.field[3]), Simd::all(-1.0f)), six_bits<g, 4>(b));
  }
};

struct Q6K {
  static constexpr int block = 256, group_size = 16, offset = 32;
  static constexpr bool minimum = false, bytes = false, table = false;
  static constexpr int sizes[4] = {128, 64, 16, 2};

  using Sum = Simd::CodeSum<63>;

  template <int g, class F>
  static inline LLAMA_INLINE void visit(const Block& b, F&& f) {
    constexpr int half = g / 8, part = g % 4;  // of 128 columns; of 16, another 16 lying 64 columns further
    constexpr bool further = g / 4 % 2;
    repeat<4>([&](auto i) LLAMA_INLINE {
      auto codes = Simd::load(b.field[0] + 64 * (16 * half + 4 * part + i));
      auto plane = Simd::load(b.field[1] + 64 * (8 * half + 4 * (part % 2) + i));
      codes = further ? Simd::high(codes) : Simd::low(codes);
      f(4 * i, Simd::template merge<3, part / 2 * 2 + 4 * further>(codes, plane));
    });
  }
  template <int g>
  static inline Simd::Floats scale(const Block& b) {
    return Simd::multiply(Simd::halves(b.field[3]), Simd::to_float(Simd::widen_signed(b.field[2] + 16 * g)));
  }
};

template <class Format>
struct Walk {  // the blocks of one tile, in order from `block` on
  Block now;
  Walk(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block = 0) {
    for (int i = 0; i < 4; ++i) {
      now.field[i] = packed + (tile * blocks + block) * kTile * Format::sizes[i];
      packed += tiles * blocks * kTile * Format::sizes[i];
    }
  }
  void next() {
    for (int i = 0; i < 4; ++i) now.field[i] += kTile * Format::sizes[i];
  }
};

template <class Format, int rows>
void product_rows(const uint8_t* packed, int64_t tiles, int64_t tile, const Activations& a, int64_t first, float* out) {
  using Sum = typename Format::Sum;
  constexpr int groups = Format::block / Format::group_size;
  const int64_t blocks = a.columns / Format::block, groups_before = first * (a.columns / Format::group_size);
  const auto* x = (const typename Sum::Code*)a.codes + first * a.columns;
  const float *scale = a.scale + groups_before, *sum = a.sum + groups_before;
  const int32_t* start = a.start + groups_before;
  typename Simd::Floats total[rows];
  for (int m = 0; m < rows; ++m) total[m] = Simd::all(0.0f);

  Walk<Format> walk(packed, tiles, tile, blocks);
  for (int64_t b = 0; b < blocks; ++b, walk.next()) {
    repeat<groups>([&](auto group) LLAMA_INLINE {
      constexpr int g = group;
      Sum acc[rows];
      repeat<rows>([&](auto m) LLAMA_INLINE { acc[m].start(start[g * rows + m]); });
      Format::template visit<g>(walk.now, [&](int column, Simd::Bytes codes) LLAMA_INLINE {
        const auto weights = Sum::weights(codes);
        repeat<rows>([&](auto m) LLAMA_INLINE {
          acc[m].add(weights, x + (g * rows + m) * Format::group_size + column);
        });
      });
      const auto d = Format::template scale<g>(walk.now);
      repeat<rows>([&](auto m) LLAMA_INLINE {
        const auto factor = Simd::multiply(d, Simd::all(scale[g * rows + m]));
        total[m] = Simd::fma(Simd::to_float(acc[m].total()), factor, total[m]);
      });
      if constexpr (Format::minimum) {
        const auto lowest = Format::template lowest<g>(walk.now);
        repeat<rows>([&](auto m) LLAMA_INLINE {
          total[m] = Simd::fma(lowest, Simd::all(sum[g * rows + m]), total[m]);
        });
      }
    });
    x += rows * Format::block;
    start += rows * groups, scale += rows * groups, sum += rows * groups;
  }
  for (int m = 0; m < rows; ++m) Simd::store(out + m * kTile, total[m]);
}

template <class Format>
void product(const uint8_t* packed, int64_t tiles, int64_t tile, const Activations& a, int64_t first, int64_t count,
             float* out) {
  repeat<4>([&](auto power) {
    constexpr int rows = 1 << power;
    if constexpr (rows <= Simd::max_rows)
      if (count == rows) product_rows<Format, rows>(packed, tiles, tile, a, first, out);
  });
}

// x * (127 / largest magnitude), rounded to even; a group of zeros, or too small to divide by, gets scale 0.
template <class Format>
void quantize(const float* x, int64_t first, int64_t count, const Activations& a) {
  using Code = typename Format::Sum::Code;
  constexpr int group = Format::group_size;
  constexpr float round_to_even = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const int32_t offset = Format::bytes ? Simd::byte_offset : Format::offset;
  const int64_t groups = a.columns / group;
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = x + m * a.columns + g * group;
      const int64_t at = first * groups + g * count + m;
      int32_t bits[group], largest = 0, sum = 0;
      std::memcpy(bits, from, sizeof bits);
      for (int i = 0; i < group; ++i) largest = std::max(largest, bits[i] & 0x7fffffff);
      float peak;
      std::memcpy(&peak, &largest, 4);
      const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
      for (int i = 0; i < group; ++i) {
        bits[i] = (int32_t)((from[i] * inverse + round_to_even) - round_to_even);
        sum += bits[i];
      }
      Code* codes = (Code*)a.codes + at * group;
      for (int i = 0; i < group; i += 4)
        for (int c = 0; c < 4; ++c) codes[i + c] = (Code)bits[i + Format::Sum::order[c]];
      a.scale[at] = peak <= 1e-30f ? 0.0f : peak / 127.0f;  // not a number stays so
      a.start[at] = -offset * sum;
      a.sum[at] = a.scale[at] * sum;
    }
  }
}

// Four columns of 16 rows: out[column * stride + lane] = value * scale + lowest. Not inlined: it is large, and enough.
template <class Format, class T>
__attribute__((noinline)) void write_columns(const Simd::Bytes& codes, const Simd::Floats& scale,
                                             const Simd::Floats& lowest, int64_t stride, T* out) {
  repeat<4>([&](auto c) LLAMA_INLINE {
    auto value = Format::bytes ? Simd::template signed_byte<c>(codes) : Simd::template byte<c>(codes);
    if constexpr (Format::table) {
      value = Simd::left(Simd::template signed_byte<c>(Simd::lookup(kNf4.high, codes)), 8);
      value = Simd::add(value, Simd::template signed_byte<c>(Simd::lookup(kNf4.low, codes)));
    }
    Simd::store(out + c * stride, Simd::fma(Simd::to_float(value), scale, lowest));
  });
}

template <class Format, class T>
void dequantize(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block, int64_t stride,
                T* out) {
  const Walk<Format> walk(packed, tiles, tile, blocks, block);
  repeat<Format::block / Format::group_size>([&](auto group) LLAMA_INLINE {
    constexpr int g = group;
    const Simd::Floats scale = Format::template scale<g>(walk.now);
    Simd::Floats lowest;
    if constexpr (Format::minimum) {
      lowest = Format::template lowest<g>(walk.now);
    } else {
      lowest = Simd::multiply(scale, Simd::all(-(float)Format::offset));
    }
    Format::template visit<g>(walk.now, [&](int column, Simd::Bytes codes) LLAMA_INLINE {
      write_columns<Format, T>(codes, scale, lowest, stride, out + (g * Format::group_size + column) * stride);
    });
  });
}

template <class Format>
constexpr Kernel kernel() {
  constexpr int bytes = Format::sizes[0] + Format::sizes[1] + Format::sizes[2] + Format::sizes[3];
  return {Format::block, Format::group_size, bytes, sizeof(typename Format::Sum::Code), Simd::max_rows, quantize<Format>, product<Format>,
          dequantize<Format, float>, dequantize<Format, uint16_t>};
}

const Kernel* find_kernel(const std::string& format) {
  static const std::pair<const char*, Kernel> kernels[] = {
      {"sym_int4", kernel<Affine<64, 4, false>>()},    {"asym_int4", kernel<Affine<64, 4, true>>()},
      {"sym_int5", kernel<Affine<64, 5, false>>()},    {"asym_int5", kernel<Affine<64, 5, true>>()},
      {"sym_int8", kernel<Affine<64, 8, false, 4>>()}, {"nf4", kernel<NormalFloat4>()},
      {"q4_0", kernel<Affine<32, 4, false>>()},        {"q4_1", kernel<Affine<32, 4, true>>()},
      {"q5_0", kernel<Affine<32, 5, false>>()},        {"q5_1", kernel<Affine<32, 5, true>>()},
      {"q8_0", kernel<Affine<32, 8, false>>()},        {"q4_k", kernel<Q4K>()},
      {"q6_k", kernel<Q6K>()},                         {"zero_int4", kernel<ZeroPoint4>()},
  };
  for (const auto& entry : kernels)
    if (format == entry.first) return &entry.second;
  return nullptr;
}
