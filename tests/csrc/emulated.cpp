// `launch` on the emulated machine, and what thin.cu asks of a device where there is none.
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "emulation.hpp"
#include "launch.hpp"

namespace mpo {
namespace {

// All blocks of a grid, in any order.
template <class Body>
Status start(int x, int y, int z, int threads, Body body) {
  static std::mt19937 random(0);
  simt::Block block(threads);
  simt::Block::current() = &block;
  std::vector<int> order(static_cast<size_t>(x) * static_cast<size_t>(y) * static_cast<size_t>(z));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  try {
    for (int k : order) block.run(k % x, k / x % y, k / x / y, body, random);
  } catch (const std::runtime_error& fault) {
    Status failed{Code::kFailed};
    std::snprintf(failed.message, sizeof failed.message, "%s", fault.what());
    return failed;
  }
  return {};
}

template <class E, class S, int G, int NT>
Status start(Instance<E, S, G, NT>, const Arguments& a) {
  const Product& p = a.product;
  const auto blocks = [](int size, int tile) { return (size + tile - 1) / tile; };
  // What a block finds in shared memory is no number.
  std::vector<float> shared(kSharedFloats<NT>);
  return start(blocks(p.m, p.m_tile()), blocks(p.columns, 8 * NT), p.splits, kThreads, [&] {
    if (simt::thread() == 0) std::fill(shared.begin(), shared.end(), std::nanf(""));
    simt::synchronize();
    thin<E, S, G, NT>(a, shared.data());
  });
}

template <class E>
Status launch_as(const Chain& chain, const Operands& operands) {
  const auto thin = [](auto instance, const Arguments& a, bool) { return start(instance, a); };
  const auto add = [](const Sum& s) {
    const int blocks = static_cast<int>((s.size + kSumThreads - 1) / kSumThreads);
    return start(blocks, 1, 1, kSumThreads, [&] { sum<E>(s); });
  };
  return enqueue<E>(chain, operands, thin, add);
}

}  // namespace

Status limits_of_device(int, int* architecture, int* multiprocessors) {
  *architecture = 90, *multiprocessors = 132;
  return {};
}

Status launch(const Chain& chain, const Operands& operands, int, void*) {
  if (std::getenv("MPO_KERNELS_NO_LAUNCH") != nullptr)
    return {};  // what is left is the host's time
  return chain.element == Element::kFloat16 ? launch_as<Float16>(chain, operands)
                                            : launch_as<BFloat16>(chain, operands);
}

}  // namespace mpo
