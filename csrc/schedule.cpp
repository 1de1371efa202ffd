// The choice of a schedule: which blocks of every index a thread block takes. Plain C++.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <limits>

#include "chain.hpp"

namespace mpo {
namespace {

__attribute__((format(printf, 2, 3))) Status status(Code code, const char* format, ...) {
  Status result{code};
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(result.message, sizeof result.message, format, arguments);
  va_end(arguments);
  return result;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

int log2_of(int power) {
  int shift = 0;
  while (1 << shift < power) ++shift;
  return shift;
}

int power_of_two(int n) { return 1 << log2_of(n); }

// What a device does in a second, all processors: data sheets but for 9.0, which was fitted to an
// H200, where multiply-adds wait for the widening and turning of what they read.
struct Rates {
  int architecture;
  double memory, cache, macs;
};

constexpr Rates kRates[] = {
    {80, 1.6e12, 4.0e12, 140e12}, {86, 0.7e12, 2.0e12, 70e12},   {89, 0.8e12, 4.0e12, 130e12},
    {90, 4.0e12, 3.5e12, 120e12}, {100, 6.5e12, 8.0e12, 300e12}, {120, 1.5e12, 4.0e12, 150e12},
};

Rates rates_of(int architecture) {
  Rates found = kRates[0];
  for (const Rates& rates : kRates) {
    if (rates.architecture <= architecture) found = rates;
  }
  return found;
}

constexpr double kStart = 3e-6;      // of a block: its origin, its code, its first barriers
constexpr double kLatency = 0.8e-6;  // of a product's first loads and its barriers
constexpr int kMaxSize = 1 << 30;
constexpr int kMaxColumns = 64;
constexpr int64_t kMaxPartials = 1 << 26;  // fp32 values that splits may leave
constexpr int kMaxDepth = 2048;
constexpr int kStagedBytes = 64 << 10;  // of x at a time

// Blocks of each level: of the digits of x, of the digits of y, of the bond to the level before.
struct Tile {
  int in[kMaxParts], out[kMaxParts], from[kMaxParts];
  int cluster;
};

int bytes_of(Stored stored) { return stored == Stored::kSame ? 2 : 1; }

const Core& core_of(const Problem& p, int level) {
  return p.cores[p.from_left ? level : p.parts - 1 - level];
}

Status check(const Problem& p, const Limits& limits) {
  if (limits.architecture < 80) {
    return status(Code::kUnsupported, "architecture: expected sm_80 or later, got sm_%d",
                  limits.architecture);
  }
  if (p.parts < 2 || p.parts > kMaxParts) {
    return status(Code::kInvalid, "cores: expected 2 or %d, got %d", kMaxParts, p.parts);
  }
  if (p.rows < 1 || p.rows > kMaxRows) {
    return status(Code::kInvalid, "rows: expected 1 to %d, got %d", kMaxRows, p.rows);
  }
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  int64_t ins = 1, outs = 1;
  for (int k = 0; k < p.parts; ++k) {
    const Core& c = p.cores[k];
    const int bond = k == 0 ? 1 : p.cores[k - 1].bond_out;
    if (c.bond_in != bond || (k == p.parts - 1 && c.bond_out != 1)) {
      return status(Code::kInvalid,
                    "core %d: expected bonds that fit its neighbours, got %d and %d", k, c.bond_in,
                    c.bond_out);
    }
    const int sizes[] = {c.bond_in, c.in, c.out, c.bond_out};
    const int64_t strides[] = {c.stride_bond_in, c.stride_in, c.stride_out, c.stride_bond_out};
    int64_t reach = 1;
    for (int i = 0; i < 4; ++i) {
      if (sizes[i] < 1 || sizes[i] > kMaxSize || strides[i] < 0) {
        return status(Code::kInvalid,
                      "core %d: expected sizes of 1 to 2^30 and strides from 0, got %d, %lld", k,
                      sizes[i], static_cast<long long>(strides[i]));
      }
      if (sizes[i] > 1 && strides[i] > kMost) reach = kMost + 1;
      if (reach <= kMost) reach += (sizes[i] - 1) * strides[i];
    }
    if (reach > kMost) {
      return status(Code::kInvalid, "core %d: expected it to span fewer than 2^31 elements", k);
    }
    ins = std::min(ins * c.in, kMost + 1), outs = std::min(outs * c.out, kMost + 1);
  }
  if (ins > kMost || outs > kMost) {
    return status(Code::kInvalid, "cores: expected in and out sizes below 2^31");
  }
  if (p.in_features < 1 || p.in_features > ins) {
    return status(Code::kInvalid, "in_features: expected 1 to %lld, got %d",
                  static_cast<long long>(ins), p.in_features);
  }
  if (p.out_features < 1 || p.out_features > outs) {
    return status(Code::kInvalid, "out_features: expected 1 to %lld, got %d",
                  static_cast<long long>(outs), p.out_features);
  }
  return {};
}

// The axes of every level, blocks aside, and the strides of its digits.
Schedule levels_of(const Problem& p) {
  Schedule s = {};
  s.parts = p.parts, s.rows = p.rows, s.element = p.element, s.stored = p.stored;
  s.in_features = p.in_features, s.out_features = p.out_features;
  const auto stride = [](int size, int64_t of) { return size > 1 ? static_cast<int>(of) : 0; };
  int x_stride = 1, y_stride = 1;
  for (int k = p.parts - 1; k >= 0; --k) {
    const Core& c = p.cores[k];
    Level& l = s.levels[p.from_left ? k : p.parts - 1 - k];
    Axis bond_in{c.bond_in, stride(c.bond_in, c.stride_bond_in), 1, 1};
    Axis bond_out{c.bond_out, stride(c.bond_out, c.stride_bond_out), 1, 1};
    l.in = {c.in, stride(c.in, c.stride_in), 1, 1};
    l.out = {c.out, stride(c.out, c.stride_out), 1, 1};
    l.from = p.from_left ? bond_in : bond_out;
    l.to = p.from_left ? bond_out : bond_in;
    l.x_stride = x_stride, l.y_stride = y_stride;
    x_stride *= c.in, y_stride *= c.out;
  }
  return s;
}

// How a level is read: in vectors along the one index whose elements are neighbours in memory, if
// every vector is aligned and lies within a block and within the core.
void choose_access(Level& l, bool first, bool last, bool aligned) {
  const auto vectors = [&](const Axis& along, int block) {
    bool fits = aligned && along.stride == 1 && along.extent % 8 == 0 && block >= 8;
    for (const Axis* axis : {&l.in, &l.out, &l.from, &l.to}) {
      fits = fits && (axis == &along || axis->stride % 8 == 0);
    }
    return fits;
  };
  const Axis& k_minor = first ? l.in : l.from;
  l.to_minor = !last;
  if (!last && vectors(l.to, l.to.block)) {
    l.access = Access::kAlongM;
  } else if (vectors(l.out, l.out.block)) {
    l.access = Access::kAlongM;
    l.to_minor = false;
  } else {
    l.access = vectors(k_minor, k_minor.block) ? Access::kAlongK : Access::kScalar;
  }
}

// Fills in what follows from the blocks; false where that does not fit the device.
bool complete(const Problem& p, const Limits& limits, const Tile& tile, Schedule* schedule) {
  Schedule& s = *schedule;
  const int last = s.parts - 1;
  int most_columns = 0;
  int64_t tiles = 1, splits = 1;
  s.cluster = tile.cluster;
  for (int level = 0; level <= last; ++level) {
    Level& l = s.levels[level];
    l.in.block = tile.in[level], l.out.block = tile.out[level], l.from.block = tile.from[level];
    l.to.block = level < last ? tile.from[level + 1] : 1;
    for (Axis* axis : {&l.in, &l.out, &l.from, &l.to}) {
      axis->blocks = ceil_div(axis->extent, axis->block);
    }
    // Blocks past the last digit of y compute nothing but their share of the first product.
    if (level == last) l.out.blocks = round_up(l.out.blocks, tile.cluster);
    tiles *= l.out.blocks;
    splits = std::min<int64_t>(splits * l.in.blocks, kMaxSize);
    splits = std::min<int64_t>(splits * l.from.blocks, kMaxSize);
    l.columns = s.rows;
    for (int k = 0; k <= last; ++k) {
      l.columns *= k < level ? tile.out[k] : k > level ? tile.in[k] : 1;
    }
    most_columns = std::max(most_columns, l.columns);
  }
  if (most_columns > kMaxColumns || splits > 65535 || tiles > kMaxSize) return false;
  s.tiles = static_cast<int>(tiles), s.splits = static_cast<int>(splits);
  s.column_tiles = most_columns <= 8 ? 1 : most_columns <= 16 ? 2 : 4;
  int used = round_up(static_cast<int>(sizeof(Origin)), 16);
  bool shared_strips = s.cluster > 1;
  for (int level = 0; level <= last; ++level) {
    Level& l = s.levels[level];
    choose_access(l, level == 0, level == last, core_of(p, level).aligned);
    l.in_shift = log2_of(l.in.block), l.out_shift = log2_of(l.out.block);
    const int m_minor = l.to_minor ? l.to.block : l.out.block;
    l.m_tile = l.out.block * l.to.block;
    l.m_shift = m_minor < l.m_tile ? log2_of(m_minor) : 31;
    l.k_shift = level == 0 ? 31 : log2_of(l.from.block);
    l.inner_shift = 0;
    for (int k = level + 2; k <= last; ++k) l.inner_shift += log2_of(tile.in[k]);
    const int strips = std::min(kWarps, power_of_two(ceil_div(l.m_tile, 64)));
    l.strips_shift = log2_of(strips);
    shared_strips = shared_strips || strips < kWarps;
    const int rows = round_up(l.columns, 8 * s.column_tiles);
    l.depth = level == 0 ? round_up(l.in.extent, 32) : l.in.block * l.from.block;
    l.chunk = l.depth;
    if (level == 0) {
      s.slice = round_up(ceil_div(l.depth, s.cluster), 32);
      l.chunk = std::min(s.slice, std::max(32, kStagedBytes / (2 * rows) / 256 * 256));
    }
    // Two n lie half the banks apart.
    l.state_stride = l.chunk % 64 == 32 ? l.chunk : l.chunk + 32;
    l.state = used;
    used += 2 * rows * l.state_stride;
  }
  s.scratch = used;
  if (shared_strips) used += kWarps * 8 * s.column_tiles * 64 * static_cast<int>(sizeof(float));
  s.exchange = used;
  if (s.cluster > 1)
    used += (64 << s.levels[0].strips_shift) * 8 * s.column_tiles * static_cast<int>(sizeof(float));
  s.shared_memory = used;
  return used <= limits.shared_memory && s.partials() <= kMaxPartials;
}

double predict(const Schedule& s, const Limits& limits) {
  const Rates rates = rates_of(limits.architecture);
  const double cache = rates.cache / limits.multiprocessors;
  const double macs = rates.macs / limits.multiprocessors;
  const int last = s.parts - 1;
  double block = kStart, stored = 0;
  for (int level = 0; level <= last; ++level) {
    const Level& l = s.levels[level];
    const auto taken = [](const Axis& axis) { return double(std::min(axis.block, axis.extent)); };
    const double core = taken(l.out) * taken(l.to) * taken(l.in) * taken(l.from);
    const int groups = ceil_div(l.columns, 8 * s.column_tiles);
    const int strips = ceil_div(l.m_tile, 64 << l.strips_shift);
    const int depth = level == 0 ? s.slice : l.depth, chunks = ceil_div(depth, l.chunk);
    const double share = double(depth) / l.depth;
    // One element at a time, instructions are the limit.
    double bytes = share * core * groups * bytes_of(s.stored);
    if (l.access == Access::kScalar) bytes *= 8;
    // Values of the state go through shared memory; x comes from the cache, in short runs.
    const double state = double(l.columns) * depth * 2;
    bytes += level == 0 ? 2 * state : 0.5 * state;
    const double work =
        double(groups) * 8 * s.column_tiles * depth * round_up(l.m_tile, 64 << l.strips_shift);
    block += std::max(bytes / cache, work / macs) + kLatency * strips * groups * chunks;
    if (level == 0 && s.cluster > 1) block += 2 * kLatency * strips * groups;
    stored += double(l.out.extent) * l.to.extent * l.in.extent * l.from.extent * bytes_of(s.stored);
  }
  // Clusters have to fit the groups that multiprocessors come in.
  const int together = s.cluster > 1 ? limits.multiprocessors * 7 / 8 : limits.multiprocessors;
  const double waves = std::ceil(double(s.tiles) * s.splits / together);
  double seconds = waves * block;
  if (s.splits > 1) {
    const double tile = double(s.levels[last].columns) * s.levels[last].m_tile * sizeof(float);
    seconds += waves * tile / cache + 1e-6 + s.splits * tile / cache;
  }
  return std::max(seconds, stored / rates.memory);
}

// Calls `use` with each power of two from `low` that is not past the one that covers `extent`.
template <class Use>
void powers(int low, int extent, int most, const Use& use) {
  for (int size = low; size <= most; size *= 2) {
    use(size);
    if (size >= extent) return;
  }
}

}  // namespace

Status plan(const Problem& p, const Limits& limits, Schedule* schedule) {
  const Status checked = check(p, limits);
  if (!checked.ok()) return checked;
  Schedule trial = levels_of(p);
  const int last = p.parts - 1;
  const Level* levels = trial.levels;
  double best = std::numeric_limits<double>::infinity();
  Tile tile = {};
  tile.in[0] = levels[0].in.extent, tile.from[0] = 1;
  const auto consider = [&] {
    powers(64, levels[last].out.extent, 1 << 30, [&](int span) {
      tile.out[last] = span;
      const int most = limits.architecture >= 90 ? kMaxCluster : 1;
      powers(1, ceil_div(levels[last].out.extent, span), most, [&](int cluster) {
        tile.cluster = cluster;
        if (!complete(p, limits, tile, &trial)) return;
        trial.seconds = predict(trial, limits);
        if (trial.seconds < best) best = trial.seconds, *schedule = trial;
      });
    });
  };
  // Blocks of one level after the other, from the last one back.
  const auto of_level = [&](const auto& self, int level, int ins, int outs) -> void {
    if (level == 0) return consider();
    powers(1, levels[level].in.extent, kMaxColumns / ins, [&](int in) {
      tile.in[level] = in;
      powers(8, std::max(32, levels[level].from.extent), kMaxDepth / in, [&](int from) {
        if (in * from < 32) return;  // what a warp takes at a time
        tile.from[level] = from;
        powers(1, levels[level - 1].out.extent, kMaxColumns / outs, [&](int out) {
          tile.out[level - 1] = out;
          self(self, level - 1, ins * in, outs * out);
        });
      });
    });
  };
  of_level(of_level, last, p.rows, p.rows);
  if (best == std::numeric_limits<double>::infinity()) {
    return status(Code::kUnsupported,
                  "shared memory: no schedule fits %d bytes and leaves few enough sums",
                  limits.shared_memory);
  }
  return {};
}

Status prepare(const Problem& p, const Schedule& s, const Operands& o, Arguments* arguments) {
  const auto check = [](const char* name, int index, const void* pointer, size_t alignment) {
    char label[16];
    std::snprintf(label, sizeof label, index < 0 ? "%s" : "%s %d", name, index);
    if (pointer == nullptr)
      return status(Code::kInvalid, "%s: expected an address, got null", label);
    if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return Status{};
    return status(Code::kInvalid, "%s: expected an address divisible by %zu, got %p", label,
                  alignment, pointer);
  };
  *arguments = {s, o, false, 0};
  Operands& ordered = arguments->operands;
  Status result = check("x", -1, o.x, 2);
  if (result.ok()) result = check("y", -1, o.y, 2);
  if (result.ok() && o.bias != nullptr) result = check("bias", -1, o.bias, 2);
  if (result.ok() && s.splits > 1) result = check("partials", -1, o.partials, 16);
  if (result.ok() && s.splits > 1) result = check("counters", -1, o.counters, sizeof(int));
  for (int level = 0; level < s.parts && result.ok(); ++level) {
    const int k = p.from_left ? level : s.parts - 1 - level;
    const size_t element = static_cast<size_t>(bytes_of(s.stored));
    const bool vectors = s.levels[level].access != Access::kScalar;
    ordered.cores[level] = o.cores[k];
    result = check("core", k, o.cores[k], vectors ? 8 * element : element);
    if (level + 1 == s.parts || !result.ok()) continue;
    const int bond = p.from_left ? level : s.parts - 2 - level;
    ordered.scales[level] = o.scales[bond];
    if (o.scales[bond] != nullptr) result = check("scales", bond, o.scales[bond], sizeof(float));
  }
  if (!result.ok()) return result;
  if (o.x_row < 0 || o.x_column < 0) {
    return status(Code::kInvalid, "x: expected strides from 0, got %lld, %lld",
                  static_cast<long long>(o.x_row), static_cast<long long>(o.x_column));
  }
  const Level& first = s.levels[0];
  arguments->x_vector = first.x_stride == 1 && o.x_column == 1 && o.x_row % 8 == 0 &&
                        first.in.extent % 8 == 0 && s.in_features % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(o.x) % 16 == 0;
  const int neighbours = first.x_stride != 1   ? first.columns
                         : arguments->x_vector ? first.chunk / 8
                                               : first.chunk;
  arguments->x_shift = log2_of(neighbours);
  return {};
}

}  // namespace mpo
