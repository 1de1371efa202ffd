// `launch` on the emulated machine.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "emulation.hpp"
#include "chain.cuh"

namespace mpo {
namespace {

using Body = void (*)(const Arguments&, char*);

template <class E, class S>
Body of_tiles(int tiles) {
  return tiles == 1 ? chain<E, S, 1> : tiles == 2 ? chain<E, S, 2> : chain<E, S, 4>;
}

template <class E>
Body of_stored(Stored stored, int tiles) {
  return stored == Stored::kSame     ? of_tiles<E, Same>(tiles)
         : stored == Stored::kFloat8 ? of_tiles<E, Float8>(tiles)
                                     : of_tiles<E, Int8>(tiles);
}

simt::Range range(const void* pointer, int64_t bytes, bool writable = false, bool once = false) {
  const char* begin = static_cast<const char*>(pointer);
  return {begin, begin + bytes, writable, once};
}

}  // namespace

Status launch(const Problem& p, const Schedule& s, const Operands& o, int, void*) {
  Arguments arguments;
  const Status status = prepare(p, s, o, &arguments);
  if (!status.ok()) return status;
  std::vector<simt::Range> ranges = {
      range(o.x, 2 * ((s.rows - 1) * o.x_row + (s.in_features - 1) * o.x_column + 1)),
      range(o.y, 2 * int64_t{s.rows} * s.out_features, true, true)};
  for (int k = 0; k < p.parts; ++k) {
    const Core& c = p.cores[k];
    const int64_t reach = (c.bond_in - 1) * c.stride_bond_in + (c.in - 1) * c.stride_in +
                          (c.out - 1) * c.stride_out + (c.bond_out - 1) * c.stride_bond_out + 1;
    ranges.push_back(range(o.cores[k], reach * (s.stored == Stored::kSame ? 2 : 1)));
  }
  if (o.bias != nullptr) ranges.push_back(range(o.bias, 2 * int64_t{s.out_features}));
  if (s.splits > 1) {
    ranges.push_back(range(o.partials, 4 * s.partials(), true));
    ranges.push_back(range(o.counters, 4 * int64_t{s.counters()}, true));
  }
  const Body body = s.element == Element::kFloat16 ? of_stored<Float16>(s.stored, s.column_tiles)
                                                   : of_stored<BFloat16>(s.stored, s.column_tiles);
  static uint32_t seed = 0;
  std::mt19937 random(++seed);
  simt::Machine machine(kThreads, s.cluster, s.shared_memory, std::move(ranges), seed);
  // Clusters come in any order.
  std::vector<int> clusters(static_cast<size_t>(s.tiles / s.cluster) *
                            static_cast<size_t>(s.splits));
  std::iota(clusters.begin(), clusters.end(), 0);
  std::shuffle(clusters.begin(), clusters.end(), random);
  try {
    for (int cluster : clusters) {
      const int first = cluster * s.cluster;
      machine.run(first % s.tiles, first / s.tiles, [&] { body(arguments, machine.shared()); });
    }
  } catch (const simt::Fault& fault) {
    Status failed{Code::kFailed};
    std::snprintf(failed.message, sizeof failed.message, "%s", fault.what());
    return failed;
  }
  return {};
}

}  // namespace mpo
