// What the processor that runs this can do, and how numbers of 16 bits are read and written without its help.
#pragma once
#include <cstdint>
#include <cstring>

namespace llama {

inline bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

inline bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

inline float from_bfloat16(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return (uint16_t)((bits + (bits >> 16 & 1) + 0x7fff) >> 16);
}

}  // namespace llama
