// The kernels, written once over `Simd` (16 lanes, one weight row each) and included by every instruction-set file
// inside its own namespace. A weight operand is 64 bytes: for each of 16 rows the codes of 4 neighbouring columns.
// llama/kernels/formats.py describes the bytes; kernel layout: field after field, each [tile][block][unit][row].

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

  inline LLAMA_INLINE Simd::Bytes load(int i, int at) const { return Simd::load(field[i] + at); }
};

// One that is read once, from memory: what lies further on is fetched past the caches that hold Python and activations.
struct Streamed : Block {
  inline LLAMA_INLINE Simd::Bytes load(int i, int at) const {
    __builtin_prefetch(field[i] + at + kPrefetch, 0, 0);
    return Block::load(i, at);
  }
};

// A format cuts a block into groups (`group_size` columns with one scale(g); activations are rounded by such groups)
// and those into steps (`step_size` columns with one minimum, lowest(s), and in K-quants one whole number, step(s),
// that the scale is multiplied by). visit(block, s, i, f) calls f(column, codes) for the i-th `together` operands of
// step s, `column` counting from the step's first; s and i are constants once the loops over them are unrolled. `sizes`
// are a row's bytes in each field, in kernel order.
//
// Sum multiplies codes by activations: `clear` at a group's begin, `open` at a step's, then `add` for its operands and
// `close` after each `most` of them, which divides their number. `value` is then the sum of all.

template <int Columns, int Bits, bool HasMinimum, int ScaleBytes = 2>
struct Affine {
  static constexpr int block = Columns, group_size = Columns, step_size = Columns;
  static constexpr bool minimum = HasMinimum, steps = false, bytes = Bits == 8, table = false;
  static constexpr int offset = HasMinimum || bytes ? 0 : 1 << (Bits - 1), together = bytes ? 1 : 2;
  static constexpr int sizes[4] = {bytes ? Columns : Columns / 2, Bits == 5 ? Columns / 8 : 0, ScaleBytes,
                                   HasMinimum ? 2 : 0};
  using Sum =
      std::conditional_t<bytes, Simd::ByteSum<step_size>, Simd::CodeSum<(1 << Bits) - 1, offset, step_size>>;

  template <class B, class F>
  static inline LLAMA_INLINE void visit(const B& b, int, int i, F&& f) {
    const auto codes = b.load(0, 64 * i);
    if constexpr (bytes) {
      f(4 * i, codes);
    } else if constexpr (Bits == 4) {
      f(4 * i, Simd::low(codes));
      f(4 * i + Columns / 2, Simd::high(codes));
    } else {  // a plane holds one bit of eight operands
      const int further = i + Columns / 8;
      f(4 * i, Simd::merge<1>(Simd::low(codes), b.load(1, 64 * (i / 8)), i % 8));
      f(4 * further, Simd::merge<1>(Simd::high(codes), b.load(1, 64 * (further / 8)), further % 8));
    }
  }
  static inline LLAMA_INLINE Simd::Floats scale(const Block& b, int) {
    if constexpr (ScaleBytes == 4) return Simd::floats(b.field[2]);
    return Simd::halves(b.field[2]);
  }
  static inline LLAMA_INLINE Simd::Floats lowest(const Block& b, int) { return Simd::halves(b.field[3]); }
};

struct ZeroPoint4 : Affine<64, 4, true> {  // its minimum is minus the scale times a byte
  static constexpr int sizes[4] = {32, 0, 2, 1};

  static inline LLAMA_INLINE Simd::Floats lowest(const Block& b, int) {
    return Simd::multiply(Simd::multiply(scale(b, 0), Simd::all(-1.0f)), Simd::to_float(Simd::widen(b.field[3])));
  }
};

struct NormalFloat4 {
  static constexpr int block = 64, group_size = 64, step_size = 64, offset = 0, together = 2;
  static constexpr bool minimum = false, steps = false, bytes = true, table = true;
  static constexpr int sizes[4] = {32, 0, 2, 0};
  using Sum = Simd::LevelSum;

  template <class B, class F>
  static inline LLAMA_INLINE void visit(const B& b, int, int i, F&& f) {
    const auto codes = b.load(0, 64 * i);
    f(4 * i, Simd::high(codes));
    f(4 * i + 32, Simd::low(codes));
  }
  static inline LLAMA_INLINE Simd::Floats scale(const Block& b, int) {
    return Simd::multiply(Simd::halves(b.field[2]), Simd::all(1.0f / 32639));
  }
};

struct Q4K {
  static constexpr int block = 256, group_size = 64, step_size = 32, offset = 0, together = 1;
  static constexpr bool minimum = true, steps = true, bytes = false, table = false;
  static constexpr int sizes[4] = {128, 12, 2, 2};
  using Sum = Simd::CodeSum<15, offset, step_size>;

  template <class B, class F>
  static inline LLAMA_INLINE void visit(const B& b, int s, int i, F&& f) {
    const auto codes = b.load(0, 64 * (s / 2 * 8 + i));
    f(4 * i, s % 2 ? Simd::high(codes) : Simd::low(codes));
  }
  // Six bits from twelve bytes: steps 0-3 in the low bits of bytes `first` + 0..3; steps 4-7 have their low four
  // bits in bytes 8..11 (scales below, minima above) and their high two above the six of steps 0-3.
  static inline LLAMA_INLINE Simd::Ints six_bits(const Block& b, int s, int first) {
    auto byte = [&](int i) LLAMA_INLINE { return Simd::widen(b.field[1] + 16 * i); };
    if (s < 4) return Simd::mask(byte(first + s), 63);
    const auto low = first ? Simd::right(byte(s + 4), 4) : Simd::mask(byte(s + 4), 15);
    return Simd::either(low, Simd::left(Simd::right(byte(first + s - 4), 6), 4));
  }
  static inline LLAMA_INLINE Simd::Floats scale(const Block& b, int) { return Simd::halves(b.field[2]); }
  static inline LLAMA_INLINE Simd::Ints step(const Block& b, int s) { return six_bits(b, s, 0); }
  static inline LLAMA_INLINE Simd::Floats lowest(const Block& b, int s) {
    const auto factor = Simd::multiply(Simd::halves(b.field[3]), Simd::all(-1.0f));
    return Simd::multiply(factor, Simd::to_float(six_bits(b, s, 4)));
  }
};

struct Q6K {
  static constexpr int block = 256, group_size = 64, step_size = 16, offset = 32, together = 1;
  static constexpr bool minimum = false, steps = true, bytes = false, table = false;
  static constexpr int sizes[4] = {128, 64, 16, 2};
  using Sum = Simd::CodeSum<63, offset, step_size>;

  template <class B, class F>
  static inline LLAMA_INLINE void visit(const B& b, int s, int i, F&& f) {
    const int half = s / 8, part = s % 4;  // of 128 columns; of 16, another 16 lying 64 columns further
    const bool further = s / 4 % 2;
    const auto codes = b.load(0, 64 * (16 * half + 4 * part + i));
    const auto plane = b.load(1, 64 * (8 * half + 4 * (part % 2) + i));
    f(4 * i, Simd::merge<3>(further ? Simd::high(codes) : Simd::low(codes), plane, part / 2 * 2 + 4 * further));
  }
  static inline LLAMA_INLINE Simd::Floats scale(const Block& b, int) { return Simd::halves(b.field[3]); }
  static inline LLAMA_INLINE Simd::Ints step(const Block& b, int s) { return Simd::widen_signed(b.field[2] + 16 * s); }
};

template <class Format, class B = Block>
struct Walk {  // the blocks of one tile, in order from `block` on
  B now;
  Walk(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block = 0) {
    for (int i = 0; i < 4; ++i) {
      now.field[i] = packed + (tile * blocks + block) * kTile * Format::sizes[i];
      packed += tiles * blocks * kTile * Format::sizes[i];
    }
  }
  void next(int64_t count = 1) {
    for (int i = 0; i < 4; ++i) now.field[i] += count * kTile * Format::sizes[i];
  }
};

// A block's weights as `multiply` takes them: decoded as they are asked for, which is best for a few activation rows,
template <class Format, class B>
struct Packed {
  using Of = Format;
  static constexpr int num_groups = Format::block / Format::group_size;
  static constexpr int steps_of_group = Format::group_size / Format::step_size;
  const B& block;

  template <class F>
  inline LLAMA_INLINE void groups(F&& f) const {
    LLAMA_UNROLL for (int g = 0; g < num_groups; ++g) f(g);
  }
  template <class F>
  inline LLAMA_INLINE void steps(int g, F&& f) const {
    LLAMA_UNROLL for (int i = 0; i < steps_of_group; ++i) f(g * steps_of_group + i, i);
  }
  template <class F, class G>
  inline LLAMA_INLINE void visit(int s, F&& f, G&& close) const {
    constexpr int together = Format::together, run = Format::Sum::most / together;
    LLAMA_UNROLL for (int first = 0; first < Format::step_size / 4 / together; first += run) {
      LLAMA_UNROLL for (int i = 0; i < run; ++i)
        Format::visit(block, s, first + i, [&](int column, const Simd::Bytes& codes) LLAMA_INLINE {
          f(column, Format::Sum::weights(codes));
        });
      close();
    }
  }
  inline LLAMA_INLINE auto step(int s) const { return Simd::step(Format::step(block, s)); }
  inline LLAMA_INLINE auto scale(int g) const { return Format::scale(block, g); }
  inline LLAMA_INLINE auto lowest(int s) const { return Format::lowest(block, s); }
};

// and decoded beforehand, for many.
template <class Format>
struct Unpacked {
  using Of = Format;
  static constexpr int num_groups = Format::block / Format::group_size, num_steps = Format::block / Format::step_size;
  static constexpr int steps_of_group = num_steps / num_groups, operands = Format::step_size / 4;
  typename Format::Sum::Weights weights_of[num_steps][operands];
  Simd::Step step_of[Format::steps ? num_steps : 1];
  Simd::Floats scale_of[num_groups], lowest_of[Format::minimum ? num_steps : 1];

  void fill(const Packed<Format, Block>& from) {
    LLAMA_UNROLL for (int s = 0; s < num_steps; ++s) {
      auto keep = [&](int column, const auto& weights) LLAMA_INLINE { weights_of[s][column / 4] = weights; };
      from.visit(s, keep, [] {});
      if constexpr (Format::steps) step_of[s] = from.step(s);
      if constexpr (Format::minimum) lowest_of[s] = from.lowest(s);
    }
    for (int g = 0; g < num_groups; ++g) scale_of[g] = from.scale(g);
  }
  template <class F>
  inline LLAMA_INLINE void groups(F&& f) const {
    for (int g = 0; g < num_groups; ++g) f(g);
  }
  template <class F>
  inline LLAMA_INLINE void steps(int g, F&& f) const {
    for (int i = 0; i < steps_of_group; ++i) f(g * steps_of_group + i, i);
  }
  template <class F, class G>
  inline LLAMA_INLINE void visit(int s, F&& f, G&& close) const {
    constexpr int run = Format::Sum::most;
    LLAMA_UNROLL for (int first = 0; first < operands; first += run) {
      LLAMA_UNROLL for (int i = first; i < first + run; ++i) f(4 * i, weights_of[s][i]);
      close();
    }
  }
  inline LLAMA_INLINE const auto& weights(int s, int column) const { return weights_of[s][column / 4]; }
  inline LLAMA_INLINE const auto& step(int s) const { return step_of[s]; }  // not copied: gcc would do it in halves
  inline LLAMA_INLINE const auto& scale(int g) const { return scale_of[g]; }
  inline LLAMA_INLINE const auto& lowest(int s) const { return lowest_of[s]; }
};

// total[t * rows + row] += the products with a block of tile t, of tiles side by side: what is read of the activations
// serves all of them.
template <int num_tiles, class Source, class Rows>
inline LLAMA_INLINE void multiply(const Source* const* blocks, const Rows& a, Simd::Floats* total) {
  using Format = typename Source::Of;
  constexpr int rows = Rows::rows;
  const Source& block = *blocks[0];
  block.groups([&](int g) LLAMA_INLINE {
    typename Format::Sum acc[num_tiles * rows];
    for (int i = 0; i < num_tiles * rows; ++i) acc[i].clear();
    block.steps(g, [&](int s, int of_group) LLAMA_INLINE {
      for (int i = 0; i < num_tiles * rows; ++i) acc[i].open(a.start(i % rows, s));
      auto add = [&](int column, const auto& weights) LLAMA_INLINE {
        LLAMA_UNROLL for (int m = 0; m < rows; ++m) {
          const auto* x = a.codes(m, g) + of_group * Format::step_size + column;
          acc[m].add(weights, x);
          if constexpr (num_tiles > 1)
            LLAMA_UNROLL for (int t = 1; t < num_tiles; ++t) acc[t * rows + m].add(blocks[t]->weights(s, column), x);
        }
      };
      block.visit(s, add, [&]() LLAMA_INLINE {
        LLAMA_UNROLL for (int t = 0; t < num_tiles; ++t) {
          if constexpr (Format::steps) {
            const auto& step = blocks[t]->step(s);
            for (int m = 0; m < rows; ++m) acc[t * rows + m].close(step);
          } else {
            for (int m = 0; m < rows; ++m) acc[t * rows + m].close();
          }
        }
      });
    });
    LLAMA_UNROLL for (int t = 0; t < num_tiles; ++t) {
      const auto& d = blocks[t]->scale(g);
      for (int m = 0; m < rows; ++m) {
        const auto factor = Simd::multiply(d, Simd::all(a.scale(m, g)));
        auto& sum = total[t * rows + m];
        sum = Simd::fma(Simd::to_float(acc[t * rows + m].value), factor, sum);
      }
      if constexpr (Format::minimum) {
        block.steps(g, [&](int s, int) LLAMA_INLINE {
          const auto& lowest = blocks[t]->lowest(s);
          for (int m = 0; m < rows; ++m)
            total[t * rows + m] = Simd::fma(lowest, Simd::all(a.sum(m, s)), total[t * rows + m]);
        });
      }
    }
  });
}

template <class Source, class Rows>
inline LLAMA_INLINE void multiply(const Source& block, const Rows& a, Simd::Floats* total) {
  const Source* const one = &block;
  multiply<1>(&one, a, total);
}

template <int most, class F>
inline LLAMA_INLINE void with_rows(int64_t count, F&& f) {  // f(Index<count>()) for a bundle's count of rows
  repeat<4>([&](auto power) LLAMA_INLINE {
    if constexpr ((1 << power) <= most)
      if (count == 1 << power) f(Index<1 << power>());
  });
}

// None of these is inlined: each has the registers for itself. A row's products with what its rounding left are summed
// by themselves, block by block, and added in the end: so the same numbers come out whatever rows there are.
template <class Format, int rows>
__attribute__((noinline)) void product_rows(const uint8_t* packed, int64_t tiles, int64_t tile, const Activations& a,
                                            int64_t first, float* out) {
  const int64_t blocks = a.columns / Format::block;
  Simd::Floats total[rows];
  for (int m = 0; m < rows; ++m) total[m] = Simd::all(0.0f);
  Walk<Format, Streamed> walk(packed, tiles, tile, blocks);
  Bundle<Format, rows> bundle(a.whole, first * a.columns);
  for (int64_t b = 0; b < blocks; ++b, walk.next(), bundle.next())
    multiply(Packed<Format, Streamed>{walk.now}, bundle, total);
  for (int m = 0; m < rows; ++m) Simd::store(out + m * kTile, total[m]);
}

// One row, with what its rounding left.
template <class Format>
__attribute__((noinline)) void product_row(const uint8_t* packed, int64_t tiles, int64_t tile, const Activations& a,
                                           int64_t row, float* out) {
  const int64_t blocks = a.columns / Format::block;
  Simd::Floats total[2] = {Simd::all(0.0f), Simd::all(0.0f)};
  Walk<Format, Streamed> walk(packed, tiles, tile, blocks);
  Bundle<Format, 1> both[2] = {{a.whole, row * a.columns}, {a.rest, row * a.columns}};
  const int32_t* next = a.rest_blocks + row * (blocks + 1);
  for (int64_t b = 0; b < blocks; ++b, walk.next(), both[0].next()) {
    if (b != *next) {
      multiply(Packed<Format, Streamed>{walk.now}, both[0], total);
    } else {
      multiply(Packed<Format, Streamed>{walk.now}, WithRest<Format>{both[0], both[1]}, total);
      both[1].next(), ++next;
    }
  }
  Simd::store(out, Simd::add(total[0], total[1]));
}

// out += the products with what a row's rounding left.
template <class Format>
__attribute__((noinline)) void add_rest(const uint8_t* packed, int64_t tiles, int64_t tile, const Activations& a,
                                        int64_t row, float* out) {
  const int64_t blocks = a.columns / Format::block;
  Simd::Floats total = Simd::all(0.0f);
  Walk<Format, Streamed> walk(packed, tiles, tile, blocks);
  Bundle<Format, 1> rest(a.rest, row * a.columns);
  const int32_t* next = a.rest_blocks + row * (blocks + 1);
  for (int64_t b = 0; *next < blocks; b = *next++, rest.next()) {
    walk.next(*next - b);
    multiply(Packed<Format, Streamed>{walk.now}, rest, &total);
  }
  Simd::store(out, Simd::add(Simd::numbers(out), total));
}

// Some columns of tiles side by side, decoded beforehand: as many as stay in the nearest cache.
template <class Format>
constexpr int64_t panel_blocks = 256 / Format::block;
template <class Format, int num_tiles>
using Panel = Unpacked<Format>[num_tiles][panel_blocks<Format>];

// The weights of a panel that comes later. They are fetched little by little while others are multiplied: a processor
// that is asked for all of them at once has to wait.
template <class Format, int num_tiles>
struct Ahead {
  const uint8_t* codes[num_tiles];
  int64_t stride;  // bytes a step, of which a panel's products have `num_steps`

  Ahead(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block, int64_t num_steps) {
    constexpr int64_t rows = panel_blocks<Format> * kTile;
    stride = (rows * Format::sizes[0] + num_steps - 1) / num_steps;
    for (int t = 0; t < num_tiles; ++t) {
      const Walk<Format> walk(packed, tiles, tile + t, blocks, block);
      codes[t] = walk.now.field[0];
      for (int i = 1; i < 4; ++i)  // they are small
        for (int64_t byte = 0; byte < rows * Format::sizes[i]; byte += 64)
          __builtin_prefetch(walk.now.field[i] + byte);
    }
  }
  inline LLAMA_INLINE void fetch() {
    LLAMA_UNROLL for (int t = 0; t < num_tiles; ++t) {
      for (int64_t byte = 0; byte < stride; byte += 64) __builtin_prefetch(codes[t] + byte);
      codes[t] += stride;
    }
  }
};

// out[t][row] += the products of a bundle's rows with `count` blocks of the panel's tiles, from the weight's `block` on.
template <class Format, int rows, int num_tiles>
__attribute__((noinline)) void panel_rows(const Panel<Format, num_tiles>& panel, int64_t block, int64_t count,
                                          const Activations& a, int64_t first, float* out) {
  constexpr int together = num_tiles > 1 ? std::min(rows, Simd::max_rows / 2) : rows;
  const auto place = [&](int i) LLAMA_INLINE { return out + (i / together * kMaxRows + i % together) * kTile; };
  LLAMA_UNROLL for (int from = 0; from < rows; from += together, out += together * kTile) {
    if (block == 0)
      for (int i = 0; i < num_tiles * together; ++i) Simd::store(place(i), Simd::all(0.0f));
    Bundle<Format, rows> bundle(a.whole, first * a.columns + block * rows * Format::block);
    for (int64_t b = 0; b < count; ++b, bundle.next()) {
      Simd::Floats total[num_tiles * together];  // between blocks in memory: the registers are needed
      for (int i = 0; i < num_tiles * together; ++i) total[i] = Simd::numbers(place(i));
      const Unpacked<Format>* blocks[num_tiles];
      for (int t = 0; t < num_tiles; ++t) blocks[t] = &panel[t][b];
      multiply<num_tiles>(blocks, RowsOf<Bundle<Format, rows>, together>{bundle, from}, total);
      for (int i = 0; i < num_tiles * together; ++i) Simd::store(place(i), total[i]);
    }
  }
}

// out[row] += the products of some bundles' rows with one block: of what their rounding left, gathered.
template <class Format>
__attribute__((noinline)) void panel_rest(const Unpacked<Format>& block, const Gathered& rest, int64_t begin,
                                          int64_t end, float* out) {
  constexpr int rows = Simd::max_rows;
  Bundle<Format, rows> bundle(rest, begin * rows * Format::block);
  for (int64_t i = begin; i < end; ++i, bundle.next()) {
    Simd::Floats total[rows];
    const int32_t* row = rest.rows + i * rows;
    for (int m = 0; m < rows; ++m) total[m] = Simd::numbers(out + row[m] * kTile);
    multiply(block, bundle, total);
    for (int m = 0; m < rows; ++m) Simd::store(out + row[m] * kTile, total[m]);
  }
}

// Many rows: some columns are decoded once for all of them.
template <class Format, int num_tiles>
void product_many(const uint8_t* packed, int64_t tiles, int64_t tile, const Activations& a, int64_t first,
                  int64_t count, float* out) {
  const int64_t blocks = a.columns / Format::block;
  Panel<Format, num_tiles> panel;
  const int32_t* bundles = a.gathered.first + first / kMaxRows * blocks;  // of each block
  const bool has_rest = bundles[0] < bundles[blocks];
  alignas(64) float rest[num_tiles][(kMaxRows + 1) * kTile];  // and a row for what fills bundles up
  if (has_rest)
    for (auto& sums : rest) {
      std::fill_n(sums, count * kTile, 0.0f);
      std::fill_n(sums + kMaxRows * kTile, kTile, 0.0f);
    }
  for (int64_t block = 0; block < blocks; block += panel_blocks<Format>) {
    const int64_t width = std::min(panel_blocks<Format>, blocks - block);
    for (int t = 0; t < num_tiles; ++t) {
      Walk<Format> walk(packed, tiles, tile + t, blocks, block);
      for (int64_t b = 0; b < width; ++b, walk.next()) panel[t][b].fill({walk.now});
    }
    const int64_t next = block + 2 * panel_blocks<Format>;  // the time that 16 rows of one panel take is too short
    Ahead<Format, num_tiles> ahead(packed, tiles, tile + next / blocks * num_tiles, blocks, next % blocks,
                                   (count + Simd::max_rows - 1) / Simd::max_rows);
    for (int64_t row = 0, some; row < count; row += some) {
      some = bundle_rows(Simd::max_rows, count - row);
      ahead.fetch();
      with_rows<Simd::max_rows>(some, [&](auto rows) {
        panel_rows<Format, rows, num_tiles>(panel, block, width, a, first + row, out + row * kTile);
      });
    }
    for (int64_t b = 0; b < width; ++b) {
      const int32_t* at = bundles + block + b;
      if (at[0] < at[1])
        for (int t = 0; t < num_tiles; ++t) panel_rest<Format>(panel[t][b], a.gathered, at[0], at[1], rest[t]);
    }
  }
  if (!has_rest) return;
  for (int t = 0; t < num_tiles; ++t, out += kMaxRows * kTile)
    for (int64_t i = 0; i < count * kTile; i += kTile)
      Simd::store(out + i, Simd::add(Simd::numbers(out + i), Simd::numbers(rest[t] + i)));
}

// A few rows: each bundle decodes the weights anew.
template <class Format, int64_t most_decoding>
void product_few(const uint8_t* packed, int64_t tiles, int64_t tile, const Activations& a, int64_t first, int64_t count,
                 float* out) {
  for (int64_t row = 0, some; row < count; row += some) {
    some = bundle_rows(most_decoding, count - row);
    if (some == 1) {
      product_row<Format>(packed, tiles, tile, a, first + row, out + row * kTile);
      continue;
    }
    with_rows<most_decoding>(some, [&](auto rows) {
      if constexpr (rows > 1) product_rows<Format, rows>(packed, tiles, tile, a, first + row, out + row * kTile);
    });
    for (int64_t m = row; m < row + some; ++m)
      add_rest<Format>(packed, tiles, tile, a, first + m, out + m * kTile);
  }
}

template <class Format>
constexpr int max_tiles = std::min(Format::bytes ? 2 : 3, Simd::max_tiles);  // three of bytes are slower

template <class Format>
void product(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t num_tiles, const Activations& a, int64_t first,
             int64_t count, float* out) {
  constexpr int64_t most_decoding = Format::steps ? 1 : Simd::max_rows;  // a K-quant's block is long code
  const bool is_few = Simd::max_rows > 1 && count < 2 * most_decoding;
  if (is_few) {
    for (int64_t t = tile; t < tile + num_tiles; ++t, out += kMaxRows * kTile)
      product_few<Format, most_decoding>(packed, tiles, t, a, first, count, out);
  } else {
    repeat<max_tiles<Format>>([&](auto i) LLAMA_INLINE {
      if (num_tiles == i + 1) product_many<Format, i + 1>(packed, tiles, tile, a, first, count, out);
    });
  }
}

// Four columns of 16 rows: out[column * stride + lane] = value * scale + lowest. Not inlined: it is large, and enough.
template <class Format, class T>
__attribute__((noinline)) void write_columns(const Simd::Bytes& codes, const Simd::Floats& scale,
                                             const Simd::Floats& lowest, int64_t stride, T* out) {
  LLAMA_UNROLL for (int c = 0; c < 4; ++c) {
    auto value = Format::bytes ? Simd::signed_byte(codes, c) : Simd::byte(codes, c);
    if constexpr (Format::table) {
      value = Simd::left(Simd::signed_byte(Simd::lookup(kNf4.high, codes), c), 8);
      value = Simd::add(value, Simd::signed_byte(Simd::lookup(kNf4.low, codes), c));
    }
    Simd::store(out + c * stride, Simd::fma(Simd::to_float(value), scale, lowest));
  }
}

template <class Format, class T>
void dequantize(const uint8_t* packed, int64_t tiles, int64_t tile, int64_t blocks, int64_t block, int64_t stride,
                T* out) {
  constexpr int step_size = Format::step_size;
  const Walk<Format> walk(packed, tiles, tile, blocks, block);
  LLAMA_UNROLL for (int s = 0; s < Format::block / step_size; ++s) {
    Simd::Floats scale = Format::scale(walk.now, s * step_size / Format::group_size), lowest;
    if constexpr (Format::steps) scale = Simd::multiply(scale, Simd::to_float(Format::step(walk.now, s)));
    if constexpr (Format::minimum) {
      lowest = Format::lowest(walk.now, s);
    } else {
      lowest = Simd::multiply(scale, Simd::all(-(float)Format::offset));
    }
    LLAMA_UNROLL for (int i = 0; i < step_size / 4 / Format::together; ++i)
      Format::visit(walk.now, s, i, [&](int column, const Simd::Bytes& codes) LLAMA_INLINE {
        write_columns<Format, T>(codes, scale, lowest, stride, out + (s * step_size + column) * stride);
      });
  }
}

inline void write_bfloat16(const float* sums, int64_t num_tiles, int64_t count, int64_t stride, uint16_t* out) {
  for (int64_t m = 0; m < count; ++m, sums += kTile, out += stride)
    for (int64_t t = 0; t < num_tiles; ++t)
      Simd::store(out + t * kTile, Simd::numbers(sums + t * kMaxRows * kTile));
}

static_assert(Simd::max_tiles <= kMaxTiles);

template <class Format>
constexpr Kernel kernel() {
  constexpr int bytes = Format::sizes[0] + Format::sizes[1] + Format::sizes[2] + Format::sizes[3];
  return {Format::block, Format::group_size, Format::step_size, bytes, sizeof(typename Format::Sum::Code),
          Simd::max_rows, max_tiles<Format>, quantize<Format>, product<Format>, dequantize<Format, float>,
          dequantize<Format, uint16_t>, write_bfloat16};
}

std::span<const NamedKernel> lowbit_kernels() {
  static const NamedKernel kernels[] = {
      {"sym_int4", kernel<Affine<64, 4, false>>()},    {"asym_int4", kernel<Affine<64, 4, true>>()},
      {"sym_int5", kernel<Affine<64, 5, false>>()},    {"asym_int5", kernel<Affine<64, 5, true>>()},
      {"sym_int8", kernel<Affine<64, 8, false, 4>>()}, {"nf4", kernel<NormalFloat4>()},
      {"q4_0", kernel<Affine<32, 4, false>>()},        {"q4_1", kernel<Affine<32, 4, true>>()},
      {"q5_0", kernel<Affine<32, 5, false>>()},        {"q5_1", kernel<Affine<32, 5, true>>()},
      {"q8_0", kernel<Affine<32, 8, false>>()},        {"q4_k", kernel<Q4K>()},
      {"q6_k", kernel<Q6K>()},                         {"zero_int4", kernel<ZeroPoint4>()},
  };
  return kernels;
}
