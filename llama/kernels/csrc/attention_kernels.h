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

// Numbers of a stream, while a page further on is being fetched: the processor's own prefetching ends at each page.
template <class T>
inline LLAMA_INLINE Simd::Floats read_ahead(const T* at) {
  __builtin_prefetch((const char*)at + 4096);
  return Simd::numbers(at);
}

// scores[g * kChunk + t] = q[g] . keys[t]
template <class T, int group>
void score(const float* q, int64_t head_dim, const T* keys, int64_t count, float* scores) {
  auto some = [&](auto tokens, int64_t t) LLAMA_INLINE {
    constexpr int n = tokens;
    typename Simd::Floats sum[n * group];
    for (int i = 0; i < n * group; ++i) sum[i] = Simd::all(0.0f);
    for (int64_t d = 0; d < head_dim; d += kTile) {
      typename Simd::Floats key[n];
      LLAMA_UNROLL for (int i = 0; i < n; ++i) key[i] = read_ahead(keys + (t + i) * head_dim + d);
      LLAMA_UNROLL for (int g = 0; g < group; ++g) {
        const auto query = Simd::numbers(q + g * head_dim + d);
        LLAMA_UNROLL for (int i = 0; i < n; ++i) sum[i * group + g] = Simd::fma(key[i], query, sum[i * group + g]);
      }
    }
    LLAMA_UNROLL for (int i = 0; i < n * group; ++i) scores[i % group * kChunk + t + i / group] = Simd::sum(sum[i]);
  };
  constexpr int together = std::max(1, std::min(4, Simd::num_sums / group));  // sums that fit in the registers
  int64_t t = 0;
  for (; t + together <= count; t += together) some(Index<together>(), t);
  for (; t < count; ++t) some(Index<1>(), t);
}

// out[g][d] += weights[g * kChunk + t] * values[t][d], over all t
template <class T, int group>
void mix(const float* weights, int64_t head_dim, const T* values, int64_t count, float* out) {
  auto some = [&](auto vectors, int64_t d) LLAMA_INLINE {
    constexpr int n = vectors;
    typename Simd::Floats sum[n * group];
    auto place = [&](int i) LLAMA_INLINE { return out + i % group * head_dim + d + i / group * kTile; };
    LLAMA_UNROLL for (int i = 0; i < n * group; ++i) sum[i] = Simd::numbers(place(i));
    for (int64_t t = 0; t < count; ++t) {
      typename Simd::Floats value[n];
      LLAMA_UNROLL for (int i = 0; i < n; ++i) value[i] = read_ahead(values + t * head_dim + d + i * kTile);
      LLAMA_UNROLL for (int g = 0; g < group; ++g) {
        const auto weight = Simd::all(weights[g * kChunk + t]);
        LLAMA_UNROLL for (int i = 0; i < n; ++i) sum[i * group + g] = Simd::fma(weight, value[i], sum[i * group + g]);
      }
    }
    LLAMA_UNROLL for (int i = 0; i < n * group; ++i) Simd::store(place(i), sum[i]);
  };
  constexpr int together = std::max(1, std::min(4, Simd::num_sums / group));
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

template <class T, int group>
void attend_heads(const float* q, int64_t head_dim, const Stored& stored, const Run* runs, int64_t num_runs,
                  Partial out) {
  alignas(64) float scores[group * kChunk];
  int64_t count = 0;
  for (int64_t r = 0; r < num_runs; count += runs[r++].length) {
    const auto* keys = (const T*)stored.keys + runs[r].slot * head_dim;
    score<T, group>(q, head_dim, keys, runs[r].length, scores + count);
    if (!stored.key_scale) continue;
    for (int g = 0; g < group; ++g)
      for (int64_t t = 0; t < runs[r].length; ++t) scores[g * kChunk + count + t] *= stored.key_scale[runs[r].slot + t];
  }
  for (int g = 0; g < group; ++g) soften(scores + g * kChunk, count, out.peak + g, out.sum + g);
  for (int64_t i = 0; i < group * head_dim; ++i) out.values[i] = 0.0f;
  count = 0;
  for (int64_t r = 0; r < num_runs; count += runs[r++].length) {
    if (stored.value_scale) {
      for (int g = 0; g < group; ++g)
        for (int64_t t = 0; t < runs[r].length; ++t)
          scores[g * kChunk + count + t] *= stored.value_scale[runs[r].slot + t];
    }
    const auto* values = (const T*)stored.values + runs[r].slot * head_dim;
    mix<T, group>(scores + count, head_dim, values, runs[r].length, out.values);
  }
}

template <class T>
void attend_chunk(const float* q, int64_t group, int64_t head_dim, const Stored& stored, const Run* runs,
                  int64_t num_runs, Partial out) {
  for (int64_t first = 0; first < group;) {
    int64_t heads = 0;
    repeat<5>([&](auto i) {
      constexpr int sizes[] = {8, 4, 3, 2, 1}, n = sizes[i];
      if constexpr (n <= Simd::max_heads) {
        if (heads || group - first < n) return;
        attend_heads<T, n>(q + first * head_dim, head_dim, stored, runs, num_runs,
                           {out.values + first * head_dim, out.peak + first, out.sum + first});
        heads = n;
      }
    });
    first += heads;
  }
}

constexpr AttentionKernels kAttention = {attend_chunk<uint16_t>, attend_chunk<float>, attend_chunk<int8_t>};
