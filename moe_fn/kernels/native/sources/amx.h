// Products on AMX tiles, of bfloat16 pairs or of four bytes: 16 rows x 16 columns of sums and 16 steps at once. An A operand is 16 packed rows, which are 64
// bytes apart, a B operand is half of a panel's 16 steps, which are 128 bytes apart, so both are loaded from the layouts of all levels.
//
// A product instruction starts its sums from zero and adds them to C at its end, and loading and storing C rounds nothing. So the bits of a
// sum depend neither on how its steps are divided into blocks nor on the number of rows, and the longest chain of additions has 17 + steps / 16
// terms: blocks of steps are not needed for float32's accuracy.
#pragma once
#include <cstring>

#include "simd.h"
#if defined(MOE_FN_EMULATED_AMX)
#include "emulated_amx.h"
#endif

namespace moe_fn {

// All tiles have 16 rows of 64 bytes: C is 0..3, (rows 0-15, rows 16-31) x (columns 0-15, 16-31); A is 4 and 5, B 6 and 7. With fewer rows
// the other rows of A are whatever follows in memory, and those of C are dropped: a tile for 1 row takes 32 cycles per 2 KB of weights, which
// memory delivers in 150 or more, while another configuration would have to be loaded at every other block of rows.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
alignas(64) static const TileConfig TILE_CONFIG{};  // constant: GCC 12 assumes that _tile_loadconfig reads 8 bytes

// Tiles are configured while a worker's `TileRegion` lives. Another library that uses tiles on the same thread, such as oneDNN, has a
// configuration of its own, so that a region starts with loading this one; and while a configuration is loaded the system saves 8 KB of tiles
// at every switch of threads.
class TileRegion {
 public:
  TileRegion() { _tile_loadconfig(&TILE_CONFIG); }
  ~TileRegion() { _tile_release(); }
  TileRegion(const TileRegion&) = delete;
  TileRegion& operator=(const TileRegion&) = delete;
};

// The compiler must not move or drop a write to memory that a tile is loaded from: GCC 12's _tile_loadd does not say that it reads memory.
static inline void written() { asm volatile("" ::: "memory"); }

// The four products of two tiles of A and two of B, one for each tile of C.
template <class D>
struct TileProducts;
template <>
struct TileProducts<BF16> {
  static inline void upper_left() { _tile_dpbf16ps(0, 4, 6); }
  static inline void upper_right() { _tile_dpbf16ps(1, 4, 7); }
  static inline void lower_left() { _tile_dpbf16ps(2, 5, 6); }
  static inline void lower_right() { _tile_dpbf16ps(3, 5, 7); }
};
template <>
struct TileProducts<Int8> {  // signed rows, unsigned weights, as in Int8::mac; C is int32
  static inline void upper_left() { _tile_dpbsud(0, 4, 6); }
  static inline void upper_right() { _tile_dpbsud(1, 4, 7); }
  static inline void lower_left() { _tile_dpbsud(2, 5, 6); }
  static inline void lower_right() { _tile_dpbsud(3, 5, 7); }
};

// As `tile` (tile.h), with C of ROWS rounded up to 16 rows.
template <class D, int ROWS>
void amx_tile(const float* a, const float* b, int steps, float* c, bool add, const char* ahead, int lines) {
  constexpr bool TWO = ROWS > 16;  // 2 x 2 tiles of C, otherwise 1 x 2
  constexpr int PITCH = PANEL * 4, SECOND = PANEL / 2, LOWER = 16 * PANEL;
  written();
  if (add) {
    _tile_loadd(0, c, PITCH);
    _tile_loadd(1, c + SECOND, PITCH);
    if constexpr (TWO) {
      _tile_loadd(2, c + LOWER, PITCH);
      _tile_loadd(3, c + LOWER + SECOND, PITCH);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  auto products = [](const float* x, const float* w) __attribute__((always_inline)) {
    _tile_loadd(6, w, PITCH);
    _tile_loadd(4, x, 64);
    _tile_loadd(7, w + SECOND, PITCH);
    TileProducts<D>::upper_left();
    if constexpr (TWO) _tile_loadd(5, x + 16 * CHUNK, 64);
    TileProducts<D>::upper_right();
    if constexpr (TWO) {
      TileProducts<D>::lower_left();
      TileProducts<D>::lower_right();
    }
  };
  for (int chunk = steps / CHUNK; chunk > 0; chunk--, a += ROWS * CHUNK, b += CHUNK * PANEL) {
    for (int i = 0; i < 4 * lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    products(a, b);
  }
  if (const int rest = steps % CHUNK) {  // packed rows end in zeros, but after a panel comes the next one
    alignas(64) float last[CHUNK * PANEL] = {};
    std::memcpy(last, b, size_t(rest) * PANEL * 4);
    written();
    products(a, last);
  }
  _tile_stored(0, c, PITCH);
  _tile_stored(1, c + SECOND, PITCH);
  if constexpr (TWO) {
    _tile_stored(2, c + LOWER, PITCH);
    _tile_stored(3, c + LOWER + SECOND, PITCH);
  }
}

}  // namespace moe_fn
