// Attention of one chunk, written once over `Simd` (16 lanes of head_dim) and included by every instruction-set file
// inside its own namespace. All arithmetic is float32; a token's part in it does not depend on where it is stored.

// e^x for x <= 0: 2^n times a polynomial of the rest, to 2e-7 relative. What is not a number stays so.
inline Simd::Floats exponential(Simd::Floats x) {
  x = Simd::multiply(Simd::maximum(Simd::all(-87.0f), x), Simd::all(1.44269504f));
  const auto whole = Simd::round(x);
  const auto rest = Simd::fma(Simd::to_float(whole), Simd::all(-1.0f), x);
  constexpr float terms[] = {1.53533719e-4f, 1.33988752e-3f, 9.61817797e-3f, 5.55033297e-2f, 2.40226498e-1f,
                             6.93147182e-1f, 1.0f};  // minimax for 2^rest, rest in -0.5 ... 0.5 (Cephes, exp2f)
  auto y = Simd::all(terms[0]);
  LLAMA_UNROLL for (int i = 1; i < 7; ++i) y = Simd::fma(y, rest, Simd::all(terms[i]));
  return Simd::times_power_of_two(y, whole);
}

constexpr int64_t kAhead = 4096;  // bytes

// Numbers of a stream, while a page further on is being fetched: the processor's own prefetching ends at each page.
template <class T>
inline LLAMA_INLINE Simd::Floats read_ahead(const T* at) {
  __builtin_prefetch((const char*)at + kAhead);
  return Simd::numbers(at);
}

constexpr int64_t kPiece = 64;  // tokens that stay in the processor's nearest cache while all heads look at them

// scores[h * kChunk + t] = q[h] . keys[t]: each is summed in one order, however many are made together. Neither this
// nor `mix` is inlined: one function of all of them has too few registers. `ahead`: whether to fetch what comes next.
template <class T, int heads, bool ahead>
__attribute__((noinline)) void score(const float* q, int64_t head_dim, const T* keys, int64_t count, float* scores) {
  constexpr int registers = kTile / Simd::lanes;  // of `Floats`: one after the other, since there is room for one
  auto some = [&](auto tokens, int64_t t) LLAMA_INLINE {
    constexpr int n = tokens;
    typename Simd::Register sum[heads][n > 1 ? 4 : 1] = {};  // they are stored by four
    LLAMA_UNROLL for (int part = 0; part < registers; ++part) {
      typename Simd::Register now[heads][n];
      LLAMA_UNROLL for (int i = 0; i < heads * n; ++i) now[i / n][i % n] = Simd::zero();
      for (int64_t d = part * Simd::lanes; d < head_dim; d += kTile) {
        typename Simd::Register query[heads];
        LLAMA_UNROLL for (int h = 0; h < heads; ++h) query[h] = Simd::load_register(q + h * head_dim + d);
        LLAMA_UNROLL for (int i = 0; i < n; ++i) {
          const T* at = keys + (t + i) * head_dim + d;
          if (ahead && part == 0) __builtin_prefetch((const char*)at + kAhead);
          const auto key = Simd::load_register(at);
          LLAMA_UNROLL for (int h = 0; h < heads; ++h) now[h][i] = Simd::fma(key, query[h], now[h][i]);
        }
      }
      LLAMA_UNROLL for (int i = 0; i < heads * n; ++i) {
        auto& whole = sum[i / n][i % n];
        whole = part ? Simd::add(whole, now[i / n][i % n]) : now[i / n][i % n];
      }
    }
    LLAMA_UNROLL for (int h = 0; h < heads; ++h) {
      if constexpr (n > 1) {
        Simd::store_sums<n>(scores + h * kChunk + t, sum[h]);
      } else {
        scores[h * kChunk + t] = Simd::sum(sum[h][0]);
      }
    }
  };
  constexpr int together = std::max(1, std::min(4, Simd::num_sums * registers / heads));  // sums fit in the registers
  int64_t t = 0;
  if constexpr (together > 1)
    for (; t + 4 <= count; t += together) some(Index<together>(), t);  // a fourth is written over
  for (; t < count; ++t) some(Index<1>(), t);
}

// out[h][d] += weights[h * kChunk + t] * values[t][d], over all t in their order
template <class T, int heads, bool ahead>
__attribute__((noinline)) void mix(const float* weights, int64_t head_dim, const T* values, int64_t count, float* out) {
  auto some = [&](auto vectors, int64_t d) LLAMA_INLINE {
    constexpr int n = vectors;
    typename Simd::Floats sum[n * heads];
    auto place = [&](int i) LLAMA_INLINE { return out + i % heads * head_dim + d + i / heads * kTile; };
    LLAMA_UNROLL for (int i = 0; i < n * heads; ++i) sum[i] = Simd::numbers(place(i));
    const T* at = values + d;
    for (const float* w = weights; w < weights + count; ++w, at += head_dim) {
      typename Simd::Floats value[n];
      LLAMA_UNROLL for (int i = 0; i < n; ++i) {
        const T* number = at + i * kTile;
        value[i] = ahead ? read_ahead(number) : Simd::numbers(number);
      }
      LLAMA_UNROLL for (int h = 0; h < heads; ++h) {
        const auto weight = Simd::all(w[h * kChunk]);
        LLAMA_UNROLL for (int i = 0; i < n; ++i) sum[i * heads + h] = Simd::fma(weight, value[i], sum[i * heads + h]);
      }
    }
    LLAMA_UNROLL for (int i = 0; i < n * heads; ++i) Simd::store(place(i), sum[i]);
  };
  constexpr int together = std::max(1, std::min(4, Simd::num_sums / heads));  // sums that fit in the registers
  int64_t d = 0;
  for (; d + together * kTile <= head_dim; d += together * kTile) some(Index<together>(), d);
  for (; d < head_dim; d += kTile) some(Index<1>(), d);
}

// Scores to exp(score - peak); lanes beyond `count` become 0.
inline void soften(float* scores, int64_t count, float* peak, float* sum) {
  for (int64_t t = count; t % kTile; ++t) scores[t] = -3e38f;
  auto highest = Simd::all(-3e38f);
  for (int64_t t = 0; t < count; t += kTile) highest = Simd::maximum(Simd::numbers(scores + t), highest);
  float lanes[kTile];
  Simd::store(lanes, highest);
  *peak = lanes[0];
  for (float lane : lanes) *peak = lane > *peak ? lane : *peak;
  auto total = Simd::all(0.0f);
  for (int64_t t = 0; t < count; t += kTile) {
    const auto weight = exponential(Simd::add(Simd::numbers(scores + t), Simd::all(-*peak)));
    Simd::store(scores + t, weight);
    for (int64_t lane = count - t; lane < kTile; ++lane) scores[t + lane] = 0.0f;
    total = Simd::add(total, Simd::numbers(scores + t));
  }
  *sum = Simd::sum(total);
}

// f(Index<n>(), first) for as few blocks of n heads as can be, of nearly one size.
template <class F>
inline void in_blocks(int64_t heads, F&& f) {
  for (int64_t first = 0, n; first < heads; first += n) {
    const int64_t left = heads - first, blocks = (left + Simd::max_heads - 1) / Simd::max_heads;
    n = (left + blocks - 1) / blocks;
    repeat<Simd::max_heads>([&](auto i) {
      if (n == i + 1) f(Index<i + 1>(), first);
    });
  }
}

// f(slot, t, count) for pieces of the runs' tokens from ... to - 1: of some that follow one another in both.
template <class F>
inline void in_pieces(const Run* runs, int64_t from, int64_t to, F&& f) {
  for (int64_t begin = 0; begin < to; begin += runs++->length) {
    const int64_t end = std::min(to, begin + runs->length);
    for (int64_t t = std::max(from, begin); t < end; t += kPiece)
      f(runs->slot + t - begin, t, std::min(kPiece, end - t));
  }
}

inline void scale_all(float* numbers, int64_t heads, const float* scale, int64_t count) {
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t t = 0; t < count; ++t) numbers[h * kChunk + t] *= scale[t];
}

template <class T>
void attend_chunk(const Queries& queries, const Stored& stored, const Run* runs, float* scores, Partial out) {
  const int64_t dim = queries.head_dim, heads = queries.rows * queries.heads;
  const int64_t fewest = queries.seen[0], most = queries.seen[queries.rows - 1];
  in_pieces(runs, 0, most, [&](int64_t slot, int64_t t, int64_t count) {  // also of what some rows do not see
    in_blocks(heads, [&](auto n, int64_t h) {
      const auto* keys = (const T*)stored.keys + slot * dim;
      const auto score_some = h ? score<T, n, false> : score<T, n, true>;  // the first heads fetch for all
      score_some(queries.numbers + h * dim, dim, keys, count, scores + h * kChunk + t);
    });
    if (stored.key_scale) scale_all(scores + t, heads, stored.key_scale + slot, count);
  });
  for (int64_t h = 0; h < heads; ++h)
    soften(scores + h * kChunk, queries.seen[h / queries.heads], out.peak + h, out.sum + h);
  std::fill(out.values, out.values + heads * dim, 0.0f);
  auto mix_heads = [&](int64_t first, int64_t num, int64_t from, int64_t to) {
    in_pieces(runs, from, to, [&](int64_t slot, int64_t t, int64_t count) {
      float* weights = scores + first * kChunk + t;
      if (stored.value_scale) scale_all(weights, num, stored.value_scale + slot, count);
      in_blocks(num, [&](auto n, int64_t h) {
        const auto* values = (const T*)stored.values + slot * dim;
        const auto mix_some = h ? mix<T, n, false> : mix<T, n, true>;
        mix_some(weights + h * kChunk, dim, values, count, out.values + (first + h) * dim);
      });
    });
  };
  mix_heads(0, heads, 0, fewest);
  for (int64_t row = 1; row < queries.rows; ++row)  // a weight of 0 would not hide what is not a number
    mix_heads(row * queries.heads, queries.heads, fewest, queries.seen[row]);
}

constexpr AttentionKernels kAttention = {attend_chunk<uint16_t>, attend_chunk<float>, attend_chunk<int8_t>};
