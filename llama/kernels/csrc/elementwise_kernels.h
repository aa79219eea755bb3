// Norm, rotation and gate of one row, written once over `Simd` and included by every instruction-set file inside its
// own namespace. Arithmetic is float32; where PyTorch's operators would round to T in between, so do these.

template <class T>
inline Simd::Floats rounded(Simd::Floats v) {
  alignas(64) T lanes[kTile];
  Simd::store(lanes, v);
  return Simd::numbers(lanes);
}

template <class T>
void rms_norm(const T* x, const T* weight, int64_t columns, float eps, T* out) {
  auto sum = Simd::all(0.0f);
  for (int64_t i = 0; i < columns; i += kTile) {
    const auto v = Simd::numbers(x + i);
    sum = Simd::fma(v, v, sum);
  }
  const auto scale = Simd::all(1.0f / std::sqrt(Simd::sum(sum) / columns + eps));
  for (int64_t i = 0; i < columns; i += kTile) {
    const auto normal = rounded<T>(Simd::multiply(Simd::numbers(x + i), scale));
    Simd::store(out + i, Simd::multiply(normal, Simd::numbers(weight + i)));
  }
}

template <class T>
void rotate(const T* x, const float* cos, const float* sin, int64_t columns, T* out) {
  for (int64_t i = 0; i < columns; i += kTile) {
    const auto v = Simd::numbers(x + i);
    const auto turned = Simd::multiply(Simd::swap_neighbours(v), Simd::numbers(sin + i));
    Simd::store(out + i, Simd::fma(v, Simd::numbers(cos + i), turned));
  }
}

template <class T>
void swiglu(const T* gate, const T* up, int64_t columns, T* out) {
  const auto one = Simd::all(1.0f);
  for (int64_t i = 0; i < columns; i += kTile) {
    const auto v = Simd::numbers(gate + i);
    // e^x is made for x <= 0: silu(v) = v / (1 + e^-v), and for negative v the same with both sides times e^v
    const auto small = exponential(Simd::negative_magnitude(v));
    const auto above = Simd::divide(v, Simd::add(one, small));
    const auto silu = rounded<T>(Simd::where_negative(v, Simd::multiply(above, small), above));
    Simd::store(out + i, Simd::multiply(silu, Simd::numbers(up + i)));
  }
}

template <class T>
void add(const T* x, int64_t columns, T* out) {
  for (int64_t i = 0; i < columns; i += kTile)
    Simd::store(out + i, Simd::add(Simd::numbers(x + i), Simd::numbers(out + i)));
}

template <class T>
ElementwiseKernels<T> elementwise_kernels() { return {rms_norm<T>, rotate<T>, swiglu<T>, add<T>}; }
