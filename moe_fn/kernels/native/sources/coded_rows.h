// Rows of x as operands of products with quantized weights: the row's dwords in the order of the decoded weights, padded to whole chunks,
// followed by the scale of an int8 row and, if the sums need a correction (zero points, offsets), the sums of x over each span.
#pragma once
#include "decode.h"
#include "product.h"

namespace moe_fn {

template <class C>
struct RowShape {
  static constexpr bool BF16_ROWS = std::is_same_v<typename C::Dot, BF16>;
  int dwords, extra;  // operands of products, and the values after them; both multiples of a chunk
  explicit RowShape(const Weight& w) {
    dwords = round_up(w.steps() * C::PER, CHUNK);
    extra = round_up(int(int8() || w.codes->corrected(BF16_ROWS) ? 1 + w.codes->spans.size() : 0), CHUNK);
  }
  static constexpr bool int8() { return std::is_same_v<typename C::Dot, Int8>; }
  int all() const { return dwords + extra; }
  int64_t inputs() const { return int64_t(dwords) * C::Dot::PER_DWORD; }
};

// Address of chunk i of a row that is contiguous, or is one of several packed rows.
struct Strided {
  float* first;
  int64_t stride;  // floats
  float* chunk(int64_t i) const { return first + i * stride; }
};

// Permutes 16 bytes to the order of the decoded weights (decode.h).
template <class C>
static inline void permute(const void* from, void* to) {
  typedef uint16_t words __attribute__((vector_size(16)));
  typedef uint8_t bytes __attribute__((vector_size(16)));
  using D = typename C::Dot;
  if constexpr (std::is_same_v<D, Int8>) {
    bytes x; std::memcpy(&x, from, 16);
    if constexpr (C::INPUTS == 8) x = __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    std::memcpy(to, &x, 16);
  } else {
    words x; std::memcpy(&x, from, 16);
    if constexpr (D::PER_DWORD == 2 && C::INPUTS == 8) x = __builtin_shufflevector(x, x, 0, 4, 1, 5, 2, 6, 3, 7);
    if constexpr (D::PER_DWORD == 2 && C::INPUTS == 4) x = __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7);
    std::memcpy(to, &x, 16);
  }
}

// Converts one row of `inner` elements of type D to a coded row; one of float16 to float32.
template <class C, class D>
inline void code_row(const Weight& w, Strided from, Strided to, float* values) {
  using Element = typename D::Element;
  constexpr int PER_CHUNK = CHUNK * D::PER_DWORD;
  const Codes& q = *w.codes;
  const RowShape<C> shape(w);
  auto chunk_of = [&](int i, Element* out) {  // elements past the end are zero
    const int there = int(std::clamp<int64_t>(w.inner - int64_t(i) * PER_CHUNK, 0, PER_CHUNK));
    if (there < PER_CHUNK) std::memset(out, 0, CHUNK * 4);
    if (there > 0) std::memcpy(out, from.chunk(i), there * sizeof(Element));
  };
  alignas(64) Element elements[PER_CHUNK];
  if (std::is_same_v<typename C::Dot, D> && !shape.extra) {
    for (int i = 0; i < shape.dwords / CHUNK; i++) {
      chunk_of(i, elements);
      for (int part = 0; part < 4; part++) permute<C>((const char*)elements + part * 16, (char*)to.chunk(i) + part * 16);
    }
    return;
  }
  veci largest{};
  for (int i = 0; i * PER_CHUNK < shape.inputs(); i++) {
    chunk_of(i, elements);
    for (int c = 0; c < PER_CHUNK; c += WIDTH) {
      const vec x = D::load(elements + c);
      store(values + i * PER_CHUNK + c, x);
      const veci bits = (veci)x & 0x7fffffff;  // ordered like the magnitudes, with NaN as the largest
      largest = (veci)select(bits > largest, (vec)bits, (vec)largest);
    }
  }
  auto extra = [&](int i) -> float& { return to.chunk((shape.dwords + i) / CHUNK)[i % CHUNK]; };
  if constexpr (std::is_same_v<typename C::Dot, Int8>) {
    float amax = 1e-10f;
    for (int i = 0; i < WIDTH; i++) {
      const float m = ((vec)largest)[i];
      amax = m <= amax ? amax : m;
      if (m != m) { amax = m; break; }
    }
    const float scale = amax / 127.f;
    extra(0) = scale;
    for (int i = 0; i < shape.dwords / CHUNK; i++) {
      alignas(64) int8_t codes[64];
      for (int c = 0; c < 64; c += WIDTH) {
        const vec shifted = load(values + i * 64 + c) / scale + 12582912.f;  // 1.5 * 2^23: the nearest integer is in the low bits
        const veci bits = (veci)shifted;
        typedef int8_t lanes __attribute__((vector_size(WIDTH)));
        const lanes narrow_bits = __builtin_convertvector((bits << 24) >> 24, lanes);
        std::memcpy(codes + c, &narrow_bits, sizeof narrow_bits);
        store(values + i * 64 + c, shifted - 12582912.f);
      }
      for (int part = 0; part < 4; part++) permute<C>(codes + part * 16, (char*)to.chunk(i) + part * 16);
    }
  } else {
    for (int i = 0; i < shape.dwords / CHUNK; i++) {
      using Dot = typename C::Dot;
      constexpr int OF_CHUNK = CHUNK * Dot::PER_DWORD;
      alignas(64) typename Dot::Element now[OF_CHUNK];
      for (int c = 0; c < OF_CHUNK; c += WIDTH) Dot::store(now + c, load(values + i * OF_CHUNK + c));
      for (int part = 0; part < 4; part++) permute<C>((const char*)now + part * 16, (char*)to.chunk(i) + part * 16);
    }
  }
  for (int s = 0; shape.extra && s < int(q.spans.size()); s++) {
    const float *x = values + q.spans[s].first * C::INPUTS, *end = x + q.spans[s].count * C::INPUTS;
    vec sum{};
    for (; x + WIDTH <= end; x += WIDTH) sum += load(x);
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += sum[i];
    for (; x < end; x++) total += *x;
    extra(1 + s) = total;
  }
}

template <class F>
inline void in_parts(const Pool& pool, int64_t count, F some) {
  if (count <= 8 || pool.workers == 1) return some(0, count);  // starting and joining workers would cost as much
  pool([&](int worker) { some(count * worker / pool.workers, count * (worker + 1) / pool.workers); });
}

// Converts all rows of x, [rows, inner], to contiguous coded rows.
template <class C, class D>
inline void code_rows(const Pool& pool, const Weight& w, const void* x, int64_t rows, float* out) {
  const RowShape<C> shape(w);
  const int64_t row_bytes = w.inner * int64_t(sizeof(typename D::Element));
  auto some = [&](int64_t first, int64_t last) {
    Buffer values = buffer(shape.inputs() + CHUNK);  // a whole chunk of float16 at its end
    for (int64_t r = first; r < last; r++)
      code_row<C, D>(w, {(float*)(static_cast<const char*>(x) + r * row_bytes), CHUNK}, {out + r * shape.all(), CHUNK}, values.get());
  };
  in_parts(pool, rows, some);
}

// Converts packed rows of a plan's blocks, `padded` floats each, to packed coded rows in their place; not of blocks with decoded weights.
template <class C, class D>
inline void code_blocks(const Pool& pool, const Weight& w, const std::vector<RowBlock>& blocks, float* rows, int padded) {
  const RowShape<C> shape(w);
  auto some = [&](int64_t first, int64_t last) {
    Buffer values = buffer(shape.inputs() + CHUNK);  // a whole chunk of float16 at its end
    for (int64_t b = first; b < last; b++)
      for (int r = 0; r < blocks[b].rows && !blocks[b].decoded; r++) {
        const Strided row{rows + blocks[b].start * padded + r * CHUNK, int64_t(blocks[b].rows) * CHUNK};
        code_row<C, D>(w, row, row, values.get());
      }
  };
  in_parts(pool, int64_t(blocks.size()), some);
}

}  // namespace moe_fn
