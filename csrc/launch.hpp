// From a chain to its launches: what each product reads and writes, and which instance it is.
#pragma once

#include <initializer_list>

#include "thin.cuh"

namespace mpo {

template <class E, class S, int G, int NT>
struct Instance {};

// Calls `launch(Instance, arguments)` for the product's types and tile.
template <class E, class S, class Launch>
Status with_tile(const Arguments& a, Launch&& launch) {
  const Product& p = a.product;
  return p.column_tiles == 4 ? launch(Instance<E, S, 2, 4>{}, a)
         : p.groups == 4     ? launch(Instance<E, S, 4, 1>{}, a)
                             : launch(Instance<E, S, 2, 1>{}, a);
}

template <class E, class Launch>
Status with_stored(Stored stored, const Arguments& a, Launch&& launch) {
  return stored == Stored::kSame     ? with_tile<E, Same>(a, launch)
         : stored == Stored::kFloat8 ? with_tile<E, Float8>(a, launch)
                                     : with_tile<E, Int8>(a, launch);
}

// Whether all is read in whole vectors of eight elements.
inline bool vectors(const Arguments& a) {
  const Product& p = a.product;
  bool all = p.state_k == 1 && p.state_share % 8 == 0;
  for (const void* pointer : {a.weight, a.state}) {
    all = all && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  for (int size :
       {p.k, p.weight_major, p.weight_minor, p.state_c0, p.state_c1, p.state_c2, p.state_limit}) {
    all = all && size % 8 == 0;
  }
  return all;
}

// Enqueues a chain by `launch(instance, arguments, early)` and `add(sum)`.
template <class E, class Launch, class Add>
Status enqueue(const Chain& chain, const Operands& o, Launch&& launch, Add&& add) {
  const void* state = o.x;
  for (int k = 0; k < chain.parts; ++k) {
    const bool last = k == chain.parts - 1;
    Arguments a = {chain.products[k], o.cores[k], state, nullptr, nullptr, nullptr, false};
    Product& p = a.product;
    if (k == 0) p.state_c0 = o.x_row;
    const bool direct = last && p.splits == 1;
    a.scale = last ? nullptr : o.scales[k];
    a.bias = direct ? o.bias : nullptr;
    a.out = direct ? o.y : o.workspace + chain.offsets[k];
    a.vectors = vectors(a);
    if (!a.vectors) p.column_tiles = 1;
    const Status status = with_stored<E>(chain.stored, a, [&](auto instance, const Arguments& now) {
      return launch(instance, now, k > 0 || o.early);
    });
    if (!status.ok()) return status;
    state = a.out;
    if (last && !direct) {
      return add(Sum{static_cast<const float*>(a.out), o.bias, o.y, p.out_share, p.splits,
                     chain.out_features});
    }
  }
  return {};
}

}  // namespace mpo
