// AMX's tile instructions as plain loops, under the names of their intrinsics: the level "amx_emulated", for tests on CPUs without AMX.
//
// TDPBF16PS as in Intel's Software Developer's Manual (volume 2, "TDPBF16PS: Operation"), which Bochs (cpu/avx/amx.cc) computes in the same
// order: for each row of C, temporaries of the even and of the odd elements of a pair start from zero and get one fused multiply-add per step,
// in order; at the end C += even + odd. All three operations round to nearest even, take denormal inputs for zero and flush denormal results,
// whatever MXCSR says. Results are denormal if they are so after rounding to 24 bits with any exponent, as everywhere in x86.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud

namespace moe_fn {
namespace emulated {

struct Tiles {
  uint8_t rows[8] = {};
  uint16_t bytes_of_row[8] = {};
  uint32_t data[8][16][16] = {};
};
inline thread_local Tiles tiles;

constexpr float SMALLEST = 0x1p-126f, SCALE = 0x1p64f;  // the smallest normal number; SCALE moves all that is denormal into the normal range
static inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline float flushed(float x) { return std::fabs(x) < SMALLEST ? std::copysign(0.f, x) : x; }  // an input
// x y + z of inputs that are not denormal. Times SCALE, no result is rounded to a denormal; if that overflows, the result was not denormal.
static inline float fused(float x, float scaled_x, float y, float z) {
  const float result = __builtin_fmaf(x, y, z), scaled = __builtin_fmaf(scaled_x, y, z * SCALE);
  return std::fabs(scaled) < SMALLEST * SCALE ? std::copysign(0.f, scaled) : result;
}
static inline float sum(float x, float y) { return fused(x, x * SCALE, 1.f, y); }

}  // namespace emulated

static inline void _tile_loadconfig(const void* config) {
  const char* from = static_cast<const char*>(config);
  emulated::tiles = {};
  if (!from[0]) return;  // palette 0: the initial state
  std::memcpy(emulated::tiles.bytes_of_row, from + 16, 16);
  std::memcpy(emulated::tiles.rows, from + 48, 8);
}
static inline void _tile_release() { emulated::tiles = {}; }
static inline void _tile_zero(int tile) { std::memset(emulated::tiles.data[tile], 0, sizeof emulated::tiles.data[tile]); }
static inline void _tile_loadd(int tile, const void* base, int64_t stride) {
  _tile_zero(tile);
  for (int r = 0; r < emulated::tiles.rows[tile]; r++)
    std::memcpy(emulated::tiles.data[tile][r], static_cast<const char*>(base) + r * stride, emulated::tiles.bytes_of_row[tile]);
}
static inline void _tile_stored(int tile, void* base, int64_t stride) {
  for (int r = 0; r < emulated::tiles.rows[tile]; r++)
    std::memcpy(static_cast<char*>(base) + r * stride, emulated::tiles.data[tile][r], emulated::tiles.bytes_of_row[tile]);
}
static inline void _tile_dpbf16ps(int to, int left, int right) {
  using namespace emulated;
  float b[16][2][16] = {};  // [step][even, odd][column]
  const int steps = tiles.bytes_of_row[left] / 4, columns = tiles.bytes_of_row[to] / 4;
  for (int k = 0; k < steps; k++)
    for (int n = 0; n < 16; n++) {
      const uint32_t pair = tiles.data[right][k][n];
      b[k][0][n] = flushed(from_bits(pair << 16)), b[k][1][n] = flushed(from_bits(pair & 0xffff0000u));
    }
  for (int m = 0; m < tiles.rows[to]; m++) {
    float temporary[2][16] = {};
    for (int k = 0; k < steps; k++) {
      const uint32_t pair = tiles.data[left][m][k];
      for (int odd = 0; odd < 2; odd++) {
        const float x = flushed(from_bits(odd ? pair & 0xffff0000u : pair << 16)), scaled = x * SCALE;
        for (int n = 0; n < 16; n++) temporary[odd][n] = fused(x, scaled, b[k][odd][n], temporary[odd][n]);
      }
    }
    float c[16];
    std::memcpy(c, tiles.data[to][m], sizeof c);
    for (int n = 0; n < columns; n++) c[n] = sum(flushed(c[n]), sum(temporary[0][n], temporary[1][n]));
    std::memcpy(tiles.data[to][m], c, sizeof c);
  }
}
// TDPBSUD: signed bytes on the left, unsigned ones on the right; sums wrap around.
static inline void _tile_dpbsud(int to, int left, int right) {
  using namespace emulated;
  for (int m = 0; m < tiles.rows[to]; m++)
    for (int k = 0; k < tiles.bytes_of_row[left] / 4; k++)
      for (int byte = 0; byte < 32; byte += 8) {
        const int32_t x = int8_t(tiles.data[left][m][k] >> byte);
        for (int n = 0; n < tiles.bytes_of_row[to] / 4; n++)
          tiles.data[to][m][n] += uint32_t(x * int32_t(tiles.data[right][k][n] >> byte & 255));
      }
}

}  // namespace moe_fn
