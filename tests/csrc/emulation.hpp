// The machine under chain.cuh on a CPU: threads of a block as fibers, in a random order between
// barriers. It stops at what a GPU would let pass: an access outside every buffer, a misaligned
// one, shared memory that was never written, two threads at one place of it without a barrier
// between, a barrier that not every thread reaches.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#define MPO_DEVICE inline
#define MPO_UNROLL
#define MPO_UNROLL_BY_FOUR
#define MPO_NO_UNROLL

namespace mpo {

namespace simt {

struct Range {
  const char *begin, *end;
  bool writable;
  bool once;  // no byte of it may be written twice
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One cluster of blocks at a time.
class Machine {
 public:
  Machine(int threads, int cluster, int shared_bytes, std::vector<Range> ranges, uint32_t seed)
      : ranges_(std::move(ranges)),
        random_(seed),
        block_threads_(static_cast<size_t>(threads)),
        shared_bytes_(static_cast<size_t>((shared_bytes + 15) / 16 * 16)),
        shared_(shared_bytes_ * static_cast<size_t>(cluster) / 16),
        touched_(shared_bytes_ * static_cast<size_t>(cluster) / kElement),
        epochs_(static_cast<size_t>(cluster)),
        used_in_(static_cast<size_t>(cluster)),
        threads_(block_threads_ * static_cast<size_t>(cluster)),
        pending_(threads_.size()) {
    for (Thread& t : threads_) t.stack.resize(128 << 10);
  }

  char* shared(int rank) { return base() + shared_bytes_ * static_cast<size_t>(rank); }
  char* shared() { return shared(rank()); }

  // The cluster whose first block is (x, y).
  void run(int x, int y, const std::function<void()>& body) {
    first_x_ = x, block_y_ = y, body_ = &body, fault_.clear();
    // What a block finds in shared memory is not a number in any format.
    std::memset(base(), 0xff, total());
    std::fill(touched_.begin(), touched_.end(), Touch{});
    cluster_epoch_ = 0;
    std::fill(epochs_.begin(), epochs_.end(), 0);
    std::fill(used_in_.begin(), used_in_.end(), -1);
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& t = threads_[i];
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.data();
      t.context.uc_stack.ss_size = t.stack.size();
      t.context.uc_link = nullptr;
      t.begun = false;
      t.state = State::kReady;
      makecontext(&t.context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
    }
    current_machine() = this;
    while (step()) {
      if (!fault_.empty()) throw Fault(fault_);
    }
    if (!fault_.empty()) throw Fault(fault_);
  }

  static Machine*& current_machine() {
    static Machine* machine = nullptr;
    return machine;
  }

  int thread() const { return current_ % static_cast<int>(block_threads_); }
  int rank() const { return current_ / static_cast<int>(block_threads_); }
  int block_x() const { return first_x_ + rank(); }
  int block_y() const { return block_y_; }

  void barrier() { wait(State::kBarrier); }
  void cluster_barrier() { wait(State::kClusterBarrier); }

  struct Product {
    float* c;
    const uint32_t* a;
    uint32_t b0, b1;
  };

  void product(const Product& mine, float (*unpack)(uint32_t)) {
    pending_[static_cast<size_t>(current_)] = mine;
    unpack_ = unpack;
    wait(State::kProduct);
  }

  void fault(const std::string& what) {
    fault_ = "block (" + std::to_string(block_x()) + ", " + std::to_string(block_y()) +
             "), thread " + std::to_string(thread()) + ": " + what;
    wait(State::kDone);
  }

  void check_global(const void* pointer, size_t bytes, bool write) {
    const char* begin = static_cast<const char*>(pointer);
    if (reinterpret_cast<uintptr_t>(begin) % bytes != 0) fault("misaligned access");
    for (const Range& r : ranges_) {
      if (begin < r.begin || begin + bytes > r.end || (write && !r.writable)) continue;
      if (r.once && write && !stored_.insert(begin).second) fault("one place of y stored twice");
      return;
    }
    fault(write ? "a store outside every buffer" : "a load outside every buffer");
  }

  void check_remote(int rank) {
    const size_t first = static_cast<size_t>(rank) * block_threads_;
    if (rank == this->rank()) return;
    for (size_t i = first; i < first + block_threads_; ++i) {
      if (threads_[i].state == State::kDone) return fault("memory of a block that may be done");
    }
    used_in_[static_cast<size_t>(rank)] = cluster_epoch_;
  }

  bool is_shared(const void* pointer) {
    const char* at = static_cast<const char*>(pointer);
    return at >= base() && at < base() + total();
  }

  void check_shared(const void* pointer, size_t bytes, bool write) {
    const size_t begin = static_cast<size_t>(static_cast<const char*>(pointer) - base());
    if (!is_shared(pointer) || begin + bytes > total()) return fault("outside shared memory");
    if (reinterpret_cast<uintptr_t>(pointer) % (bytes < 16 ? bytes : 16) != 0) {
      return fault("misaligned access to shared memory");
    }
    const int owner = static_cast<int>(begin / shared_bytes_);
    for (size_t i = begin; i < begin + bytes; i += kElement) {
      Touch& t = touched_[i / kElement];
      bool ordered = before(t.written, owner);
      if (write) ordered = ordered && before(t.read, owner) && before(t.read_remotely, owner);
      if (!ordered) return fault("two threads at one place with no barrier between");
      Visit& visit = write ? t.written : rank() == owner ? t.read : t.read_remotely;
      const bool again = !write && !before(visit, owner);
      visit = {again ? kSeveral : current_, epochs_[static_cast<size_t>(owner)], cluster_epoch_};
    }
  }

 private:
  enum class State { kReady, kBarrier, kClusterBarrier, kProduct, kDone };

  struct Thread {
    ucontext_t context;  // where it begins
    jmp_buf place;       // where it goes on
    bool begun = false;
    std::vector<char> stack;
    State state = State::kDone;
  };

  static constexpr int kNobody = -1, kSeveral = -2;
  static constexpr size_t kElement = 2;  // bytes: every access is of whole ones

  // Who came, and after how many barriers of the block whose memory it is, and of the cluster.
  struct Visit {
    int thread = kNobody, epoch = 0, cluster_epoch = 0;
  };

  struct Touch {
    Visit written, read, read_remotely;
  };

  // Whether a barrier stands between a visit to memory of `owner` and this thread's.
  bool before(const Visit& visit, int owner) const {
    if (visit.thread == kNobody || visit.thread == current_) return true;
    const int from =
        visit.thread == kSeveral ? owner : visit.thread / static_cast<int>(block_threads_);
    const bool local = from == owner && rank() == owner;
    return local ? visit.epoch < epochs_[static_cast<size_t>(owner)]
                 : visit.cluster_epoch < cluster_epoch_;
  }

  // Aligned as shared memory is.
  char* base() { return shared_.data()->bytes; }
  size_t total() const { return kElement * touched_.size(); }

  static void enter() {
    Machine& m = *current_machine();
    (*m.body_)();
    if (m.used_in_[static_cast<size_t>(m.rank())] == m.cluster_epoch_) {
      m.fault("done, with no barrier after another block used its memory");
    }
    m.wait(State::kDone);
  }

  void wait(State state) {
    Thread& t = threads_[static_cast<size_t>(current_)];
    t.state = state;
    if (_setjmp(t.place) == 0) _longjmp(scheduler_, 1);
  }

  // Runs the current thread until it waits. Jumps, unlike contexts, call no system.
  void resume() {
    Thread& t = threads_[static_cast<size_t>(current_)];
    if (_setjmp(scheduler_) != 0) return;
    if (t.begun) _longjmp(t.place, 1);
    t.begun = true;
    setcontext(&t.context);
  }

  // Runs every warp that can go on, then opens what all have reached; false when the block is done.
  bool step() {
    bool ran = false;
    const size_t warps = threads_.size() / 32, start = random_() % warps;
    for (size_t w = 0; w < warps; ++w) {
      const size_t first = (start + w) % warps * 32;
      // One warp runs on until it waits at a barrier.
      while (fault_.empty()) {
        bool here = false;
        const size_t lane0 = random_() % 32;
        for (size_t i = 0; i < 32 && fault_.empty(); ++i) {
          const size_t index = first + (lane0 + i) % 32;
          if (threads_[index].state != State::kReady) continue;
          here = ran = true;
          current_ = static_cast<int>(index);
          resume();
        }
        if (all(first, 32, State::kProduct)) {
          multiply(first);
          set(first, 32, State::kReady);
          here = true;
        }
        if (!here) break;
      }
    }
    if (!fault_.empty()) return false;
    if (all(0, threads_.size(), State::kDone)) return false;
    if (all(0, threads_.size(), State::kClusterBarrier)) {
      ++cluster_epoch_;
      for (int& epoch : epochs_) ++epoch;
      set(0, threads_.size(), State::kReady);
      return true;
    }
    for (size_t block = 0; block < threads_.size(); block += block_threads_) {
      if (!all(block, block_threads_, State::kBarrier)) continue;
      ++epochs_[block / block_threads_];
      set(block, block_threads_, State::kReady);
      ran = true;
    }
    if (!ran) fault_ = "a barrier or a matrix product that not every thread reaches";
    return true;
  }

  bool all(size_t first, size_t count, State state) const {
    for (size_t i = first; i < first + count; ++i) {
      if (threads_[i].state != state) return false;
    }
    return true;
  }

  void set(size_t first, size_t count, State state) {
    for (size_t i = first; i < first + count; ++i) threads_[i].state = state;
  }

  // Fragments of m16n8k16 as the PTX manual has them.
  void multiply(size_t first) {
    float a[16][16], b[16][8];
    for (size_t lane = 0; lane < 32; ++lane) {
      const Product& p = pending_[first + lane];
      const size_t g = lane / 4, q = lane % 4;
      for (size_t half = 0; half < 2; ++half) {
        for (size_t i = 0; i < 4; ++i) {
          a[g + 8 * (i % 2)][2 * q + half + 8 * (i / 2)] = unpack_(p.a[i] >> (16 * half) & 0xffff);
        }
        b[2 * q + half][g] = unpack_(p.b0 >> (16 * half) & 0xffff);
        b[2 * q + half + 8][g] = unpack_(p.b1 >> (16 * half) & 0xffff);
      }
    }
    for (size_t lane = 0; lane < 32; ++lane) {
      const size_t g = lane / 4, q = lane % 4;
      for (size_t i = 0; i < 4; ++i) {
        float sum = pending_[first + lane].c[i];
        for (size_t k = 0; k < 16; ++k) sum += a[g + 8 * (i / 2)][k] * b[k][2 * q + i % 2];
        pending_[first + lane].c[i] = sum;
      }
    }
  }

  std::vector<Range> ranges_;
  std::unordered_set<const char*> stored_;
  std::mt19937 random_;
  struct alignas(16) Line {
    char bytes[16];
  };

  size_t block_threads_, shared_bytes_;
  std::vector<Line> shared_;
  std::vector<Touch> touched_;
  std::vector<int> epochs_;
  std::vector<int>
      used_in_;  // the last cluster epoch in which another block used this one's memory
  std::vector<Thread> threads_;
  std::vector<Product> pending_;
  float (*unpack_)(uint32_t) = nullptr;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::string fault_;
  int current_ = 0, cluster_epoch_ = 0, first_x_ = 0, block_y_ = 0;
};

template <int NT>
constexpr int kPiecesAhead = NT == 1 ? 2 : 1;

inline Machine& machine() { return *Machine::current_machine(); }

inline int thread() { return machine().thread(); }
inline int block_x() { return machine().block_x(); }
inline int block_y() { return machine().block_y(); }
inline void synchronize() { machine().barrier(); }
inline void fence() {}
inline int cluster_rank() { return machine().rank(); }
inline void synchronize_cluster() { machine().cluster_barrier(); }

inline int increment(int* counter) {
  machine().check_global(counter, sizeof(int), true);
  return (*counter)++;
}

inline uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> (4 * i) & 7;
    result |= static_cast<uint32_t>(bytes >> (8 * which) & 0xff) << (8 * i);
  }
  return result;
}

template <int words>
void load_vector(uint32_t (&to)[words], const char* from, bool inside) {
  std::memset(to, 0, sizeof to);
  if (!inside) return;
  machine().check_global(from, sizeof to, false);
  std::memcpy(to, from, sizeof to);
}

template <int bytes>
uint32_t load_scalar(const char* from) {
  machine().check_global(from, bytes, false);
  uint32_t value = 0;
  std::memcpy(&value, from, bytes);
  return value;
}

inline void store_scalar(char* to, uint32_t low) {
  if (machine().is_shared(to)) {
    machine().check_shared(to, 2, true);
  } else {
    machine().check_global(to, 2, true);
  }
  std::memcpy(to, &low, 2);
}

inline void load_shared(uint32_t (&to)[4], const char* from) {
  machine().check_shared(from, sizeof to, false);
  std::memcpy(to, from, sizeof to);
}

inline void store_shared(char* to, const uint32_t (&v)[4]) {
  machine().check_shared(to, sizeof v, true);
  std::memcpy(to, v, sizeof v);
}

inline void store_floats(float* to, const float (&v)[8]) {
  for (int half = 0; half < 2; ++half) {
    if (machine().is_shared(to)) {
      machine().check_shared(to + 4 * half, 16, true);
    } else {
      machine().check_global(to + 4 * half, 16, true);
    }
  }
  std::memcpy(to, v, sizeof v);
}

inline void load_floats(float (&to)[8], const float* from) {
  machine().check_shared(from, 16, false);
  machine().check_shared(from + 4, 16, false);
  std::memcpy(to, from, sizeof to);
}

// The same place in another block's shared memory, which must not be done.
template <class T>
T* remote(T* place, int rank) {
  machine().check_remote(rank);
  const auto offset = reinterpret_cast<const char*>(place) - machine().shared();
  return reinterpret_cast<T*>(machine().shared(rank) + offset);
}

inline void load_remote(float (&to)[8], const float* from, int rank) {
  load_floats(to, remote(from, rank));
}

inline void store_remote(char* to, const uint32_t (&v)[4], int rank) {
  store_shared(remote(to, rank), v);
}

inline void store_remote_scalar(char* to, uint32_t low, int rank) {
  store_scalar(remote(to, rank), low);
}

inline void load_partial(float (&to)[4], const float* from) {
  machine().check_global(from, sizeof to, false);
  std::memcpy(to, from, sizeof to);
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class E>
float unpack(uint32_t low) {
  if constexpr (E::kExponentBits == 5) {
    return static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(low)));
  } else {
    return bits_as<float>(low << 16);
  }
}

template <class E>
uint32_t rounded(float value) {
  if constexpr (E::kExponentBits == 5) {
    return bits_as<uint16_t>(static_cast<_Float16>(value));
  } else {
    const uint32_t bits = bits_as<uint32_t>(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
}

template <class E>
uint32_t pack(float low, float high) {
  return rounded<E>(low) | rounded<E>(high) << 16;
}

template <class E>
uint32_t multiply(uint32_t x, uint32_t y) {
  return pack<E>(unpack<E>(x & 0xffff) * unpack<E>(y & 0xffff),
                 unpack<E>(x >> 16) * unpack<E>(y >> 16));
}

template <class E>
uint32_t subtract(uint32_t x, uint32_t y) {
  return pack<E>(unpack<E>(x & 0xffff) - unpack<E>(y & 0xffff),
                 unpack<E>(x >> 16) - unpack<E>(y >> 16));
}

template <class E>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  machine().product({c, a, b0, b1}, [](uint32_t low) { return unpack<E>(low); });
}

}  // namespace simt
}  // namespace mpo
