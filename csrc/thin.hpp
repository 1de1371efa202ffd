// Thin products: a few rows of x times a layer held as two or three cores, a launch a core.
//
// Nothing here knows torch or Python. The caller owns every buffer and gives pointers, sizes,
// strides and a stream; a status comes back, and nothing is enqueued where it is not kOk.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mpo {

// Of this interface: the Python package refuses a library of another one.
constexpr int kInterface = 2;

constexpr int kMaxParts = 3;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kGroup = 32;        // k of a warp's step: eight neighbours for each lane of a row
constexpr int kSumThreads = 256;  // of the sum's blocks, an element each

enum class Element { kFloat16, kBFloat16 };   // of x, bias, y and states; sums are fp32
enum class Stored { kSame, kFloat8, kInt8 };  // of the cores: as x, e4m3, or signed bytes
enum class Code { kOk, kInvalid, kUnsupported, kFailed };

struct Status {
  Code code = Code::kOk;
  char message[256] = "";
  bool ok() const { return code == Code::kOk; }
};

// out [c, m] = Σ_k weight [m, k] · state [c, k], sizes and strides in elements.
//
// A column c is (c0, c1, c2) and m is (major, minor), the last digit minor; c0 is the row of x. k
// has stride 1 in the weight. `state_limit` and `out_limit`: positions in a row of x or y from
// which on there is only padding.
struct Product {
  int m, k, columns;
  int c1, c2, m_minor;  // sizes of digits; those of c0 and of m's major one follow
  int weight_major, weight_minor;
  int state_c0, state_c1, state_c2, state_k;
  int out_c0, out_c1, out_c2, out_major, out_minor;
  int state_limit, out_limit;
  int64_t state_share, out_share;  // from one share of a sum over k to the next, in fp32 elements
  int shares;  // of the state: fp32, added up where it is read; 0: it is in x's dtype
  int splits;  // shares of k that are made of `out`, in fp32 where above 1
  // The tile: 16 · kWarps / warps_k of m, 8 · column_tiles columns, and as many times as there are
  // steps 32 · groups · warps_k of k.
  int groups, column_tiles, warps_k, steps;

  int m_tile() const { return 16 * (kWarps / warps_k); }
  int64_t k_tile() const { return int64_t{kGroup} * groups * warps_k * steps; }
};

// A product with its operands, as the kernel gets it.
struct Arguments {
  Product product;
  const void* weight;
  const void* state;
  const float* scale;  // [m_minor], or null: what `out` is multiplied by
  const void* bias;    // [out_limit], or null
  void* out;
  bool vectors;  // whether weight and state are all whole vectors of eight elements along k
};

// y [rows, out] of shares [splits, rows, out] and a bias.
struct Sum {
  const float* shares;
  const void* bias;
  void* y;
  int64_t size;
  int splits, out_features;
};

// Products in a row: each reads what the one before wrote, the first x.
struct Chain {
  Product products[kMaxParts];
  int64_t offsets[kMaxParts];  // bytes into the workspace of what each makes; the last, its shares
  int parts;
  int out_features;
  Element element;
  Stored stored;
  bool programmatic;  // whether the code that runs knows of programmatic dependent launch
};

struct Operands {
  const void* x;                       // as the first product has its state
  int x_row;                           // its stride c0, which may change from call to call
  const void* cores[kMaxParts];        // in the order of the products
  const float* scales[kMaxParts - 1];  // of the bonds between them, or null
  const void* bias;                    // [out_features], or null
  void* y;                             // [rows, out_features], contiguous
  char* workspace;                     // aligned to 16 bytes, any contents; null where none is used
  // Whether no kernel that may still run writes a core: only then are they read before all that was
  // enqueued earlier is done.
  bool early;
};

// Of a device, and of the code in this library that runs there: 80 for compute capability 8.0.
Status limits_of_device(int device, int* architecture, int* multiprocessors);

// What is wrong with a chain, by the name of its field; with its operands, by theirs.
Status check(const Chain& chain);
Status check(const Chain& chain, const Operands& operands);

// Enqueues the chain, whose operands were checked; `stream` is a cudaStream_t of that device.
Status launch(const Chain& chain, const Operands& operands, int device, void* stream);

}  // namespace mpo
