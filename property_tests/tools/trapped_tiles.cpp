// AMX's tile instructions on a CPU without AMX, for tests: they raise #UD, and a handler of SIGILL decodes and executes them, so that the
// compiled library of the level "amx" runs as it is. Written after Intel's Software Developer's Manual, volume 2 (the instructions' operations
// and exception classes AMX-E1 to AMX-E6); it shares no code with the kernels' emulation.
//
// What would be #UD or #GP is noted (`violation`), and the instruction does nothing.
#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

struct Tile {
  unsigned rows, colsb;
  unsigned char row[16][64];
};
struct Thread {
  std::atomic<long> id{0};
  unsigned palette = 0, start_row = 0;
  Tile tile[8] = {};
};
Thread threads[256];
std::atomic<long> counts[6];  // of configurations, releases, loads, stores, zeros, products
char noted[256];
std::atomic<bool> is_noted{false};
struct sigaction before;

Thread& mine() {  // not thread_local: the first access to it in a handler may allocate
  const long id = syscall(SYS_gettid);
  for (Thread& t : threads) {
    long none = 0;
    if (t.id == id || t.id.compare_exchange_strong(none, id)) return t;
  }
  _exit(99);
}

bool note(const char* instruction, const char* what) {
  if (!is_noted.exchange(true)) snprintf(noted, sizeof noted, "%s: %s", instruction, what);
  return false;
}

// A VEX instruction of map 0F38 with a ModRM byte and no immediate.
struct Decoded {
  unsigned char pp, opcode, vvvv, w, l, mod, reg, rm;
  int base, index, scale;  // registers, or -1
  long displacement;
  bool sib, from_next;
  int size;
};
bool decode(const unsigned char* p, Decoded& d) {
  if (p[0] != 0xc4 || (p[1] & 31) != 2) return false;
  const int r = !(p[1] & 0x80), x = !(p[1] & 0x40), b = !(p[1] & 0x20);
  d.w = p[2] >> 7, d.vvvv = ~(p[2] >> 3) & 15, d.l = p[2] >> 2 & 1, d.pp = p[2] & 3, d.opcode = p[3];
  d.mod = p[4] >> 6, d.reg = (p[4] >> 3 & 7) + 8 * r, d.rm = (p[4] & 7) + 8 * b;
  d.size = 5, d.base = d.mod == 3 ? -1 : d.rm, d.index = -1, d.scale = 0, d.displacement = 0, d.sib = d.from_next = false;
  if (d.mod == 3) return true;
  if ((p[4] & 7) == 4) {
    const unsigned char sib = p[d.size++];
    d.sib = true, d.scale = sib >> 6, d.index = (sib >> 3 & 7) + 8 * x, d.base = (sib & 7) + 8 * b;
    if (d.index == 4) d.index = -1;
    if ((sib & 7) == 5 && d.mod == 0) d.base = -1;
  } else if ((p[4] & 7) == 5 && d.mod == 0) {
    d.base = -1, d.from_next = true;
  }
  if (d.mod == 1) {
    d.displacement = static_cast<signed char>(p[d.size++]);
  } else if (d.mod == 2 || d.base == -1) {
    int four;
    memcpy(&four, p + d.size, 4);
    d.displacement = four, d.size += 4;
  }
  return true;
}

long value_of(const ucontext_t& c, int number) {
  constexpr int place[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return c.uc_mcontext.gregs[place[number]];
}
char* address_of(const ucontext_t& c, const Decoded& d, bool with_index) {
  long at = d.displacement + (d.base < 0 ? 0 : value_of(c, d.base)) + (d.from_next ? c.uc_mcontext.gregs[REG_RIP] + d.size : 0);
  if (with_index && d.index >= 0) at += value_of(c, d.index) << d.scale;
  return reinterpret_cast<char*>(at);
}

void initial(Thread& t) {
  t.palette = t.start_row = 0;
  memset(t.tile, 0, sizeof t.tile);
}

bool configure(Thread& t, const unsigned char* memory) {
  unsigned char m[64];
  memcpy(m, memory, 64);
  if (m[0] == 0) return initial(t), true;
  if (m[0] != 1) return note("ldtilecfg", "palette is neither 0 nor 1");
  for (int i = 2; i < 64; i++)
    if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && m[i]) return note("ldtilecfg", "a reserved byte is not 0");
  unsigned rows[8], colsb[8];
  for (int i = 0; i < 8; i++) {
    colsb[i] = m[16 + 2 * i] + 256u * m[17 + 2 * i], rows[i] = m[48 + i];
    if (colsb[i] > 64 || rows[i] > 16) return note("ldtilecfg", "a tile is larger than 16 rows of 64 bytes");
    if (!colsb[i] != !rows[i]) return note("ldtilecfg", "a tile has rows or columns, but not both");
  }
  if (m[1]) return note("ldtilecfg", "start_row is not 0");  // allowed, but for interrupted instructions only
  initial(t);
  t.palette = 1;
  for (int i = 0; i < 8; i++) t.tile[i].rows = rows[i], t.tile[i].colsb = colsb[i];
  return true;
}

void store_configuration(const Thread& t, unsigned char* m) {
  memset(m, 0, 64);
  m[0] = static_cast<unsigned char>(t.palette);
  for (int i = 0; i < 8; i++) m[16 + 2 * i] = static_cast<unsigned char>(t.tile[i].colsb), m[48 + i] = static_cast<unsigned char>(t.tile[i].rows);
}

bool valid(const Thread& t, unsigned tile, const char* instruction) {
  if (!t.palette) return note(instruction, "no configuration is loaded");
  if (tile > 7) return note(instruction, "no such tile");
  if (!t.tile[tile].rows) return note(instruction, "the tile is not configured");
  if (t.tile[tile].colsb % 4) return note(instruction, "the tile's rows are not whole dwords");
  return true;
}

bool move(Thread& t, const ucontext_t& c, const Decoded& d, bool loads) {
  const char* name = loads ? "tileloadd" : "tilestored";
  if (!d.sib || d.index < 0) return note(name, "no index register");
  if (d.vvvv) return note(name, "VEX.vvvv is used");
  if (!valid(t, d.reg, name)) return false;
  Tile& tile = t.tile[d.reg];
  char* memory = address_of(c, d, false);
  const long stride = value_of(c, d.index) << d.scale;
  if (loads) memset(tile.row, 0, sizeof tile.row);
  for (unsigned r = 0; r < tile.rows; r++) loads ? memcpy(tile.row[r], memory + r * stride, tile.colsb) : memcpy(memory + r * stride, tile.row[r], tile.colsb);
  return true;
}

bool shapes_fit(const Thread& t, unsigned c, unsigned a, unsigned b, const char* name) {
  if (!valid(t, c, name) || !valid(t, a, name) || !valid(t, b, name)) return false;
  if (c == a || a == b || c == b) return note(name, "two operands are one tile");
  if (t.tile[c].rows != t.tile[a].rows) return note(name, "rows of the sums are not those of the left operand");
  if (t.tile[c].colsb != t.tile[b].colsb) return note(name, "columns of the sums are not those of the right operand");
  if (t.tile[a].colsb / 4 != t.tile[b].rows) return note(name, "the inner dimensions differ");
  return true;
}

float widened(const unsigned char* two) {
  const unsigned bits = two[0] << 16 | unsigned(two[1]) << 24;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// The caller has set MXCSR to round to nearest, flush to zero and take denormals for zero.
__attribute__((noinline)) void bf16_products(Tile& c, const Tile& a, const Tile& b) {
  for (unsigned m = 0; m < c.rows; m++) {
    for (unsigned n = 0; n < c.colsb / 4; n++) {
      float even = 0, odd = 0, sum;
      for (unsigned k = 0; k < a.colsb / 4; k++) {
        even = __builtin_fmaf(widened(a.row[m] + 4 * k), widened(b.row[k] + 4 * n), even);
        odd = __builtin_fmaf(widened(a.row[m] + 4 * k + 2), widened(b.row[k] + 4 * n + 2), odd);
      }
      memcpy(&sum, c.row[m] + 4 * n, 4);
      const float both = even + odd;
      sum = sum + both;
      memcpy(c.row[m] + 4 * n, &sum, 4);
    }
    memset(c.row[m] + c.colsb, 0, 64 - c.colsb);
  }
}

int byte_of(const unsigned char* p, bool is_signed) { return is_signed ? static_cast<signed char>(*p) : *p; }
void byte_products(Tile& c, const Tile& a, const Tile& b, bool left_signed, bool right_signed) {
  for (unsigned m = 0; m < c.rows; m++)
    for (unsigned n = 0; n < c.colsb / 4; n++) {
      unsigned sum;
      memcpy(&sum, c.row[m] + 4 * n, 4);
      for (unsigned k = 0; k < a.colsb / 4; k++)
        for (int i = 0; i < 4; i++) sum += unsigned(byte_of(a.row[m] + 4 * k + i, left_signed) * byte_of(b.row[k] + 4 * n + i, right_signed));
      memcpy(c.row[m] + 4 * n, &sum, 4);
    }
}

bool product(Thread& t, const Decoded& d) {
  const char* name = d.opcode == 0x5c ? "tdpbf16ps" : "tdpb";
  if (!shapes_fit(t, d.reg, d.rm, d.vvvv, name)) return false;
  Tile &c = t.tile[d.reg], &a = t.tile[d.rm], &b = t.tile[d.vvvv];
  if (d.opcode == 0x5c) {
    const unsigned csr = _mm_getcsr();
    _mm_setcsr(0x9fc0);
    bf16_products(c, a, b);
    _mm_setcsr(csr);
  } else {
    byte_products(c, a, b, d.pp == 3 || d.pp == 2, d.pp == 3 || d.pp == 1);
  }
  return true;
}

enum { NP, P66, PF3, PF2 };
bool execute(const ucontext_t& c, const Decoded& d) {  // false: not a tile instruction
  if (d.w || d.l) return false;
  Thread& t = mine();
  const bool memory = d.mod != 3;
  if (d.opcode == 0x49 && memory && (d.reg & 7) == 0 && d.pp == NP) {
    counts[0] += d.vvvv ? note("ldtilecfg", "VEX.vvvv is used") : configure(t, reinterpret_cast<unsigned char*>(address_of(c, d, true)));
  } else if (d.opcode == 0x49 && memory && (d.reg & 7) == 0 && d.pp == P66) {
    store_configuration(t, reinterpret_cast<unsigned char*>(address_of(c, d, true)));
  } else if (d.opcode == 0x49 && !memory && d.pp == NP && d.reg == 0 && d.rm == 0) {
    initial(t), counts[1]++;
  } else if (d.opcode == 0x49 && !memory && d.pp == PF2 && d.rm == 0) {
    if (d.vvvv) note("tilezero", "VEX.vvvv is used");
    else if (valid(t, d.reg, "tilezero")) memset(t.tile[d.reg].row, 0, sizeof t.tile[d.reg].row), counts[4]++;
  } else if (d.opcode == 0x4b && memory && d.pp != NP) {
    counts[d.pp == PF3 ? 3 : 2] += move(t, c, d, d.pp != PF3);
  } else if ((d.opcode == 0x5c && !memory && d.pp == PF3) || (d.opcode == 0x5e && !memory)) {
    counts[5] += product(t, d);
  } else {
    return false;
  }
  return true;
}

void handle(int, siginfo_t*, void* context) {
  ucontext_t& c = *static_cast<ucontext_t*>(context);
  Decoded d;
  if (decode(reinterpret_cast<const unsigned char*>(c.uc_mcontext.gregs[REG_RIP]), d) && execute(c, d)) {
    c.uc_mcontext.gregs[REG_RIP] += d.size;
  } else {
    sigaction(SIGILL, &before, nullptr);  // the instruction runs once more and raises the signal for whoever handled it before
  }
}

}  // namespace

extern "C" {
void tiles_install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &before);
}
void tiles_remove() { sigaction(SIGILL, &before, nullptr); }
const char* tiles_violation() { return is_noted ? noted : ""; }
void tiles_clear() {
  is_noted = false;
  for (auto& n : counts) n = 0;
}
long tiles_count(int kind) { return counts[kind]; }
// On a CPU with AMX: whether this thread has a configuration, which XGETBV tells by state components that are not in their initial state.
int tiles_in_use() {
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return low >> 17 & 3;
}
int tiles_configured() {  // threads
  int n = 0;
  for (const Thread& t : threads) n += t.palette != 0;
  return n;
}
}
