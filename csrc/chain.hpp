// The decode chain: y = x · W + bias for a few rows, W held as two or three cores, in one launch.
//
// Nothing here knows torch or Python. The caller owns every buffer and gives pointers, sizes,
// strides and a stream; a status comes back, and nothing is written where it is not kOk.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mpo {

// Of this interface: the Python package refuses a library of another one.
constexpr int kInterface = 1;

constexpr int kMaxParts = 3;
constexpr int kMaxRows = 16;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxCluster = 8;  // what every device with clusters grants

enum class Element { kFloat16, kBFloat16 };   // of x, bias and y; sums are fp32
enum class Stored { kSame, kFloat8, kInt8 };  // of the cores: as x, e4m3, or signed bytes
enum class Code { kOk, kInvalid, kUnsupported, kFailed };

struct Status {
  Code code = Code::kOk;
  char message[256] = "";
  bool ok() const { return code == Code::kOk; }
};

// What the choice of a schedule needs to know of a device.
struct Limits {
  int architecture;  // 80 for compute capability 8.0
  int multiprocessors;
  int shared_memory;  // bytes a block may ask for
};

// A core [bond_in, in, out, bond_out]: strides in elements.
struct Core {
  int in, out, bond_in, bond_out;
  int64_t stride_bond_in, stride_in, stride_out, stride_bond_out;
  bool aligned;  // its address is divisible by 16
};

// A column of x is the number (in_0, …), the first digit major; a column of y is (out_0, …).
struct Problem {
  int rows, in_features, out_features;
  int parts;
  Core cores[kMaxParts];
  bool from_left;  // which core is contracted first
  Element element;
  Stored stored;
};

// How a core is read: eight neighbours of m or of k at once, or one element at a time.
enum class Access { kAlongM, kAlongK, kScalar };

// One index of a core: its size, its stride in elements, how many of it a block takes, and how many
// blocks that makes.
struct Axis {
  int extent;
  int stride;
  int block;
  int blocks;
};

// One product of the chain, C[m, n] = Σ_k A[m, k] · state[n, k]: A is the core, m = (out, to) and
// k = (from, in), where `from` is the bond to the level before and `to` the one to the next. n is
// (row, out of the levels before, in of the levels after). A state is [n, k] in shared memory.
struct Level {
  Axis in, out, from, to;
  Access access;
  bool to_minor;  // neighbouring m are neighbours of the bond, not of `out`
  int m_shift;    // log2 of the block of m's minor index, 31 where it has only one
  int k_shift;    // likewise of k, whose minor index is the bond (the digit of x at level 0)
  int in_shift, out_shift;  // log2 of the blocks that are digits of n
  int inner_shift;          // log2 of the in-blocks two levels on and later, minor digits of n
  int x_stride, y_stride;   // of the digits, in columns of x and y
  int m_tile;               // m of a block
  int depth;                // k of a block, a multiple of 32
  int chunk;                // k held in shared memory at a time: all of it but at level 0
  int columns;              // n of a block
  int strips_shift;         // log2 of the strips, 64 m each, side by side in warps; the warps of
                            // one strip share the k
  int state;                // bytes into shared memory
  int state_stride;         // elements from one n to the next
};

struct Schedule {
  Level levels[kMaxParts];
  int parts;
  int rows, in_features, out_features;
  Element element;
  Stored stored;
  int tiles, splits;  // of y, and of the sum: the grid
  int cluster;        // neighbouring tiles that share the first product, a slice of its k each
  int slice;          // k of level 0 of a block: all of it, or its share in a cluster
  int column_tiles;   // n at a time, in eights: 1, 2 or 4
  int scratch;        // bytes into shared memory, for sums over warps
  int exchange;       // likewise, for sums over a cluster
  int shared_memory;  // bytes
  double seconds;     // predicted, the launch aside

  int counters() const { return splits > 1 ? tiles : 0; }
  int64_t partials() const {  // fp32 values
    const Level& last = levels[parts - 1];
    return splits > 1 ? int64_t{tiles} * splits * last.columns * last.m_tile : 0;
  }
};

struct Operands {
  const void* x;                 // [rows, in_features]
  int64_t x_row, x_column;       // strides in elements
  const void* cores[kMaxParts];  // in the layer's order, whatever the order of contraction
  // fp32 [bond] for each bond, of quantised cores: what a slice of the cores beside it was divided
  // by. Null: 1.
  const float* scales[kMaxParts - 1];
  const void* bias;  // [out_features], or null
  void* y;           // [rows, out_features], contiguous
  float* partials;   // Schedule::partials() values, any contents
  int* counters;     // Schedule::counters() zeros; zeros again when the kernel is done
};

// What stands first in a block's shared memory: where it begins in every index.
struct Origin {
  int in[kMaxParts], out[kMaxParts], from[kMaxParts + 1];
  int arrived;  // blocks of this tile that were done before this one
};

// What the kernel gets, by value.
struct Arguments {
  Schedule schedule;
  Operands operands;  // cores and scales in the order of contraction
  bool x_vector;
  int x_shift;  // log2 of the neighbouring threads that stage neighbours of x
};

// The fastest schedule by a model of its time; no device is needed.
Status plan(const Problem& problem, const Limits& limits, Schedule* schedule);

// Checks the operands against the problem, and puts them in the order of contraction.
Status prepare(const Problem& problem, const Schedule& schedule, const Operands& operands,
               Arguments* arguments);

// Of a device, and of the code in this library that runs there.
Status limits_of_device(int device, Limits* limits);

// So many words of zeros on a device, for good: no allocator that a graph's capture or replay
// manages gives them.
Status make_zeros(int device, int64_t count, void** zeros);

// Whether what is enqueued on a stream now goes into a graph.
Status is_capturing(void* stream, bool* capturing);

// Enqueues the kernel; `stream` is a cudaStream_t of that device.
Status launch(const Problem& problem, const Schedule& schedule, const Operands& operands,
              int device, void* stream);

}  // namespace mpo
