// Every schedule of a large set of problems: each element of W and of y belongs to exactly one
// block, the index arithmetic of a block is one-to-one, vectors are aligned, shared memory
// suffices.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "emulation.hpp"
#include "chain.cuh"

using namespace mpo;

namespace {

struct Case {
  Problem problem;
  Limits limits;
};

[[noreturn]] void fail(const Case& c, const char* what) {
  std::printf("%s: rows %d, from_left %d, sm_%d", what, c.problem.rows, c.problem.from_left,
              c.limits.architecture);
  for (int k = 0; k < c.problem.parts; ++k) {
    const Core& core = c.problem.cores[k];
    std::printf(", [%d, %d, %d, %d]", core.bond_in, core.in, core.out, core.bond_out);
  }
  std::printf("\n");
  std::exit(1);
}

bool power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

void require(const Case& c, bool condition, const char* what) {
  if (!condition) fail(c, what);
}

// Blocks of one index cover it once; a last one may be empty only where a cluster is filled up.
void check_axis(const Case& c, const Axis& a, bool padded) {
  require(c, a.block >= 1 && int64_t{a.blocks} * a.block >= a.extent, "an index is not covered");
  require(c, padded || (a.blocks - 1) * a.block < a.extent, "a block with nothing in it");
}

// What vectors read, from the strides alone.
void check_vectors(const Case& c, const Level& l, bool first) {
  if (l.access == Access::kScalar) return;
  const Axis& k_minor = first ? l.in : l.from;
  const Axis& along = l.access == Access::kAlongK ? k_minor : l.to_minor ? l.to : l.out;
  require(c, along.stride == 1, "a vector of elements that are not neighbours");
  require(c, along.extent % 8 == 0, "a vector past the end");
  require(c, along.block % 8 == 0 || along.blocks == 1, "a vector past the block");
  for (const Axis* axis : {&l.in, &l.out, &l.from, &l.to}) {
    require(c, axis == &along || axis->extent == 1 || axis->stride % 8 == 0, "a misaligned vector");
  }
}

// The pairs that the numbers below n are taken apart into, each once.
std::vector<std::pair<int, int>> digits(int n, int shift) {
  std::vector<std::pair<int, int>> pairs;
  pairs.reserve(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) pairs.emplace_back(i >> shift, i - (i >> shift << shift));
  std::sort(pairs.begin(), pairs.end());
  pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
  return pairs;
}

void check_level(const Case& c, const Schedule& s, int level) {
  const Level& l = s.levels[level];
  const int last = s.parts - 1;
  check_axis(c, l.in, false);
  check_axis(c, l.from, false);
  check_axis(c, l.to, false);
  check_axis(c, l.out, level == last && s.cluster > 1);
  check_vectors(c, l, level == 0);
  if (level < last) {
    require(c, l.to.block == s.levels[level + 1].from.block, "two levels that share no bond");
    require(c, power_of_two(l.out.block), "a digit of n that is no power of two");
  }
  if (level > 0) require(c, power_of_two(l.in.block), "a digit of n that is no power of two");
  // m and k of a block, as the kernel takes them apart, are all pairs once.
  std::vector<std::pair<int, int>> pairs = digits(l.m_tile, l.m_shift);
  const int minors = l.to_minor ? l.to.block : l.out.block;
  require(c, static_cast<int>(pairs.size()) == l.out.block * l.to.block, "m is not one-to-one");
  require(c, pairs.back().second < minors, "m's minor index is past its block");
  require(c, l.m_tile % 8 == 0, "a thread's m cross the block");
  if (level > 0) {
    pairs = digits(l.depth, l.k_shift);
    require(c, static_cast<int>(pairs.size()) == l.in.block * l.from.block, "k is not one-to-one");
    require(c, l.chunk == l.depth, "a state that is not whole");
  } else {
    require(c, s.slice * s.cluster >= l.in.extent && l.depth >= l.in.extent, "k is not covered");
  }
  require(c, l.depth % 32 == 0 && l.chunk % 32 == 0 && s.slice % 32 == 0, "k not in warps' steps");
  require(c, 1 << l.strips_shift <= kWarps, "strips that warps cannot share");
  int columns = s.rows;
  for (int k = 0; k <= last; ++k) {
    columns *= k < level ? s.levels[k].out.block : k > level ? s.levels[k].in.block : 1;
  }
  require(c, columns == l.columns, "columns that do not follow from the blocks");
}

void check_memory(const Case& c, const Schedule& s) {
  int end = static_cast<int>(sizeof(Origin));
  for (int level = 0; level < s.parts; ++level) {
    const Level& l = s.levels[level];
    const int eights = 8 * s.column_tiles, rows = (l.columns + eights - 1) / eights * eights;
    require(c, l.state >= end && l.state % 16 == 0, "states overlap");
    require(c, l.state_stride >= l.chunk && l.state_stride % 64 == 32,
            "rows overlap, or share banks");
    end = l.state + 2 * rows * l.state_stride;
    if (1 << l.strips_shift < kWarps || s.cluster > 1) {
      require(c, s.shared_memory >= s.scratch + kWarps * 64 * eights * 4, "no room for sums");
    }
  }
  require(c, s.scratch >= end && s.scratch % 16 == 0, "sums overlap a state");
  if (s.cluster > 1) {
    require(c, s.exchange >= s.scratch + kWarps * 64 * 8 * s.column_tiles * 4, "exchange overlaps");
    require(
        c,
        s.shared_memory >= s.exchange + (64 << s.levels[0].strips_shift) * 8 * s.column_tiles * 4,
        "no room for the exchange");
  }
  require(c, s.shared_memory <= c.limits.shared_memory, "too much shared memory");
}

// The kernel's own decoding of block numbers: a tile is every combination of blocks of y once, a
// split every combination of the others.
void check_grid(const Case& c, const Schedule& s) {
  std::vector<std::vector<int>> of_y, of_sum;
  int64_t tiles = 1, splits = 1;
  Origin at;
  for (int tile = 0; tile < s.tiles; ++tile) {
    locate(&at, s, tile, 0);
    of_y.emplace_back(at.out, at.out + s.parts);
    // A cluster's blocks differ in the last digit of y alone.
    Origin leader;
    locate(&leader, s, tile - tile % s.cluster, 0);
    require(c, std::equal(at.out, at.out + s.parts - 1, leader.out), "a cluster shares no state");
  }
  for (int split = 0; split < s.splits; ++split) {
    locate(&at, s, 0, split);
    of_sum.emplace_back(at.in, at.in + s.parts);
    of_sum.back().insert(of_sum.back().end(), at.from, at.from + s.parts);
  }
  for (int level = 0; level < s.parts; ++level) {
    const Level& l = s.levels[level];
    tiles *= l.out.blocks, splits *= int64_t{l.in.blocks} * l.from.blocks;
    for (const auto& place : of_y) {
      const int block = place[static_cast<size_t>(level)] / l.out.block;
      require(c, place[static_cast<size_t>(level)] % l.out.block == 0 && block < l.out.blocks,
              "a block out of range");
    }
  }
  require(c, tiles == s.tiles && splits == s.splits, "blocks are missing");
  for (auto* places : {&of_y, &of_sum}) {
    std::sort(places->begin(), places->end());
    require(c, std::adjacent_find(places->begin(), places->end()) == places->end(),
            "two blocks at one place");
  }
  require(c, s.tiles % s.cluster == 0 && s.splits <= 65535, "a grid that cannot be launched");
}

// Contiguous, or with in and out exchanged, as a transposed view is.
Core core_of(int bond_in, int in, int out, int bond_out, bool exchanged, bool aligned) {
  const int64_t r = bond_out;
  return {
      in, out,    bond_in, bond_out, r * in * out, exchanged ? r : r * out, exchanged ? r * in : r,
      1,  aligned};
}

long count = 0, unserved = 0;

void check(const std::vector<int>& ins, const std::vector<int>& outs, const std::vector<int>& bonds,
           bool whole) {
  const Limits devices[] = {{80, 108, 163 << 10}, {86, 84, 99 << 10},    {89, 128, 99 << 10},
                            {90, 132, 227 << 10}, {100, 148, 227 << 10}, {120, 188, 99 << 10}};
  const int parts = static_cast<int>(ins.size());
  for (const Limits& limits : devices) {
    for (int rows = 1; rows <= kMaxRows; ++rows) {
      if (!whole && rows != 1 && rows != 7 && rows != 16) continue;
      for (int variant = 0; variant < 8; ++variant) {
        Case c = {{}, limits};
        Problem& p = c.problem;
        p.rows = rows, p.parts = parts, p.from_left = variant & 1;
        p.element = Element::kBFloat16;
        p.stored = variant & 4 ? Stored::kInt8 : Stored::kSame;
        p.in_features = p.out_features = 1;
        for (int k = 0; k < parts; ++k) {
          const int left = k == 0 ? 1 : bonds[static_cast<size_t>(k - 1)];
          const int right = k == parts - 1 ? 1 : bonds[static_cast<size_t>(k)];
          const int in = ins[static_cast<size_t>(k)], out = outs[static_cast<size_t>(k)];
          p.cores[k] = core_of(left, in, out, right, variant & 2, variant != 4);
          p.in_features *= in, p.out_features *= out;
        }
        Schedule s;
        const Status status = plan(p, limits, &s);
        if (status.code == Code::kUnsupported) {
          ++unserved;  // a low rank from its wrong end leaves more sums than there is memory for
          continue;
        }
        if (!status.ok()) fail(c, status.message);
        require(c, s.parts == parts && s.rows == rows && s.seconds > 0, "not this problem");
        for (int level = 0; level < parts; ++level) check_level(c, s, level);
        check_memory(c, s);
        check_grid(c, s);
        ++count;
      }
    }
  }
}

}  // namespace

int main() {
  const std::vector<int> sizes = {1, 3, 8, 17, 64};
  for (int i0 : sizes) {
    for (int i1 : sizes) {
      for (int j0 : sizes) {
        for (int j1 : sizes) {
          for (int bond : {1, 5, 8, 48}) check({i0, i1}, {j0, j1}, {bond}, i0 + j1 == 25);
        }
      }
    }
  }
  // What layers have.
  check({24, 32}, {64, 48}, {192}, true);
  check({1, 4096}, {14336, 1}, {792}, true);
  check({4096, 1}, {1, 14336}, {792}, true);
  check({16, 512}, {1792, 16}, {1592}, true);
  check({64, 128}, {224, 128}, {472}, true);
  for (int middle : {1, 4, 12, 30}) {
    for (int bond : {3, 16, 64}) {
      check({4, middle, 8}, {8, 5, middle}, {bond, 2 * bond}, false);
      check({12, middle, 12}, {16, 48, 24}, {2 * bond, bond}, false);
    }
  }
  std::printf("%ld schedules, %ld problems not served\n", count, unserved);
  return 0;
}
