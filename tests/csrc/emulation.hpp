// The machine under thin.cuh in the tests: the threads of a block as fibers, which change places at
// barriers and matrix instructions alone. It stops where a kernel reads its inputs, or writes,
// before it has waited for them, and where threads wait for each other for ever.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#define MPO_DEVICE inline
#define MPO_UNROLL
#define MPO_UNROLL_BY_EIGHT
#define MPO_NO_UNROLL

namespace mpo::simt {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// The nearest number of so many exponent bits in 16, ties to even.
template <class E>
uint32_t round_to(float value) {
  if constexpr (E::kExponentBits == 8) {
    const uint32_t bits = bits_of(value);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
}

template <class E>
float unpack(uint32_t low) {
  if constexpr (E::kExponentBits == 8) return float_of(low << 16);
  const uint16_t bits = static_cast<uint16_t>(low);
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

template <class E>
uint32_t pack(float low, float high) {
  return round_to<E>(low) | round_to<E>(high) << 16;
}

template <class E, class Operation>
uint32_t each(uint32_t x, uint32_t y, Operation operation) {
  return pack<E>(operation(unpack<E>(x), unpack<E>(y)),
                 operation(unpack<E>(x >> 16), unpack<E>(y >> 16)));
}

template <class E>
uint32_t multiply(uint32_t x, uint32_t y) {
  return each<E>(x, y, std::multiplies<float>());
}

template <class E>
uint32_t subtract(uint32_t x, uint32_t y) {
  return each<E>(x, y, std::minus<float>());
}

inline uint32_t permute(uint32_t word, uint32_t selector) {
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) result |= (word >> 8 * (selector >> 4 * k & 3) & 0xff) << 8 * k;
  return result;
}

enum class Waits { kNo, kBarrier, kProduct, kDone };

struct Thread {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on
  bool begun = false, has_inputs = false;
  std::vector<char> stack = std::vector<char>(64 << 10);
  Waits waits = Waits::kNo;
  float* sums;  // of a matrix instruction, with its operands
  float a[8], b[4];
};

class Block {
 public:
  explicit Block(int threads) : threads_(static_cast<size_t>(threads)) {}

  void run(int x, int y, int z, const std::function<void()>& body, std::mt19937& random) {
    at_[0] = x, at_[1] = y, at_[2] = z, body_ = &body;
    std::vector<size_t> order(threads_.size());
    for (size_t k = 0; k < order.size(); ++k) {
      Thread& t = threads_[order[k] = k];
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.data();
      t.context.uc_stack.ss_size = t.stack.size();
      t.context.uc_link = nullptr;
      makecontext(&t.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
      t.begun = t.has_inputs = false;
      t.waits = Waits::kNo;
    }
    std::shuffle(order.begin(), order.end(), random);
    while (!all(0, threads_.size(), Waits::kDone)) {
      bool ran = false;
      for (size_t k : order) {
        if (threads_[k].waits == Waits::kNo) current_ = k, resume(), ran = true;
      }
      for (size_t first = 0; first < threads_.size(); first += 32) {
        if (all(first, 32, Waits::kProduct)) multiply_warp(first), ran = true;
      }
      if (all(0, threads_.size(), Waits::kBarrier)) {
        for (Thread& t : threads_) t.waits = Waits::kNo;
        ran = true;
      }
      if (!ran) throw std::runtime_error("threads wait for each other");
      if (fault_ != nullptr) throw std::runtime_error(fault_);
    }
  }

  static Block*& current() {
    static Block* block;
    return block;
  }
  int thread() const { return static_cast<int>(current_); }
  int at(int axis) const { return at_[axis]; }
  Thread& here() { return threads_[current_]; }
  void expect(bool right, const char* what) {
    if (!right) fault_ = what;
  }
  void wait(Waits what) {
    here().waits = what;
    if (_setjmp(here().place) == 0) _longjmp(scheduler_, 1);
  }

 private:
  static void enter() {
    (*current()->body_)();
    current()->wait(Waits::kDone);
  }

  bool all(size_t first, size_t count, Waits what) const {
    const auto begin = threads_.begin() + static_cast<ptrdiff_t>(first);
    return std::all_of(begin, begin + static_cast<ptrdiff_t>(count),
                       [&](const Thread& t) { return t.waits == what; });
  }

  // Runs the current thread until it waits.
  void resume() {
    Thread& t = here();
    if (_setjmp(scheduler_) != 0) return;
    if (t.begun) _longjmp(t.place, 1);
    t.begun = true;
    setcontext(&t.context);
  }

  // Fragments as the PTX manual has them for m16n8k16.
  void multiply_warp(size_t first) {
    for (int lane = 0; lane < 32; ++lane) {
      Thread& t = threads_[first + static_cast<size_t>(lane)];
      for (int c = 0; c < 4; ++c) {
        const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
        for (int k = 0; k < 16; ++k) {
          const auto owner = [&](int line) {
            return first + static_cast<size_t>(4 * (line % 8) + k % 8 / 2);
          };
          t.sums[c] += threads_[owner(row)].a[k / 8 * 4 + row / 8 * 2 + k % 2] *
                       threads_[owner(column)].b[k / 8 * 2 + k % 2];
        }
      }
      t.waits = Waits::kNo;
    }
  }

  std::vector<Thread> threads_;
  const std::function<void()>* body_ = nullptr;
  const char* fault_ = nullptr;
  size_t current_ = 0;
  int at_[3] = {};
  jmp_buf scheduler_;
};

inline int thread() { return Block::current()->thread(); }
inline int block_x() { return Block::current()->at(0); }
inline int block_y() { return Block::current()->at(1); }
inline int block_z() { return Block::current()->at(2); }
inline void synchronize() { Block::current()->wait(Waits::kBarrier); }
inline void let_next_start() {}
inline void wait_for_inputs() { Block::current()->here().has_inputs = true; }

inline void expect_inputs(const char* what) {
  Block::current()->expect(Block::current()->here().has_inputs, what);
}

template <class T, int size>
void load_vector(T (&to)[size], const void* from, bool inside) {
  const bool aligned = reinterpret_cast<uintptr_t>(from) % std::min(sizeof to, size_t{16}) == 0;
  Block::current()->expect(!inside || aligned, "misaligned");
  inside ? std::memcpy(to, from, sizeof to) : std::memset(to, 0, sizeof to);
}

template <int words>
void load_constant(uint32_t (&to)[words], const char* from, bool inside) {
  load_vector(to, from, inside);
}

template <int bytes>
uint32_t load_scalar(const char* from) {
  uint32_t value = 0;
  std::memcpy(&value, from, bytes);
  return value;
}

inline float load_float(const float* from) { return *from; }

inline void load_input(uint32_t (&to)[4], const char* from, bool inside) {
  expect_inputs("an input is read before it is there");
  load_vector(to, from, inside);
}

inline void load_input(float (&to)[8], const float* from, bool inside) {
  expect_inputs("an input is read before it is there");
  load_vector(to, from, inside);
}

inline uint32_t load_input_scalar(const char* from) {
  expect_inputs("an input is read before it is there");
  return load_scalar<2>(from);
}

inline float load_input_float(const float* from) {
  expect_inputs("an input is read before it is there");
  return *from;
}

inline void store_scalar(char* to, uint32_t low) {
  expect_inputs("a kernel writes what the one before may read");
  std::memcpy(to, &low, 2);
}

inline void store_float(float* to, float value) {
  expect_inputs("a kernel writes what the one before may read");
  *to = value;
}

template <class E>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Thread& t = Block::current()->here();
  t.sums = c;
  for (int k = 0; k < 8; ++k) t.a[k] = unpack<E>(a[k / 2] >> k % 2 * 16);
  for (int k = 0; k < 4; ++k) t.b[k] = unpack<E>((k < 2 ? b0 : b1) >> k % 2 * 16);
  Block::current()->wait(Waits::kProduct);
}

}  // namespace mpo::simt
