// Whether a chain and its operands are what the kernels compute: plain C++, needs no device.
#include <cstdio>
#include <utility>

#include "thin.hpp"

namespace mpo {
namespace {

Status invalid(int product, const char* field, int64_t value, const char* expected) {
  Status status{Code::kInvalid};
  std::snprintf(status.message, sizeof status.message, "product %d, %s: expected %s, got %lld",
                product, field, expected, static_cast<long long>(value));
  return status;
}

}  // namespace

Status check(const Chain& chain) {
  for (int k = 0; k < chain.parts; ++k) {
    const Product& p = chain.products[k];
    for (const auto& [name, size] : {std::pair{"m", p.m},
                                     {"k", p.k},
                                     {"columns", p.columns},
                                     {"c1", p.c1},
                                     {"c2", p.c2},
                                     {"m_minor", p.m_minor},
                                     {"splits", p.splits},
                                     {"steps", p.steps}}) {
      if (size < 1) return invalid(k, name, size, "1 or more");
    }
    if (p.column_tiles != 1 && p.column_tiles != 4) {
      return invalid(k, "column_tiles", p.column_tiles, "1 or 4");
    }
    if (p.groups != 2 && (p.groups != 4 || p.column_tiles != 1)) {
      return invalid(k, "groups", p.groups, "2, or 4 with one column tile");
    }
    if (p.shares > 0 && p.column_tiles != 1) {
      return invalid(k, "column_tiles", p.column_tiles, "1, for a state in shares");
    }
    if (p.warps_k < 1 || p.warps_k > kWarps || kWarps % p.warps_k != 0) {
      return invalid(k, "warps_k", p.warps_k, "a divisor of 8");
    }
    if (p.splits != (p.k + p.k_tile() - 1) / p.k_tile()) {
      return invalid(k, "splits", p.splits, "as many tiles as k has");
    }
    // Of one tile, which is taken where something is not in whole vectors.
    if ((int64_t{p.columns} + 7) / 8 > 65535) {
      return invalid(k, "columns", p.columns, "65535 tiles of eight at most");
    }
    if (p.splits > 65535) return invalid(k, "splits", p.splits, "65535 at most");
    if (p.shares !=
        (k == 0 || chain.products[k - 1].splits == 1 ? 0 : chain.products[k - 1].splits)) {
      return invalid(k, "shares", p.shares, "those that the product before makes");
    }
  }
  return {};
}

Status check(const Chain& chain, const Operands& o) {
  Status status;
  const auto expect = [&](const char* name, const void* address, uintptr_t alignment, bool needed) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (!status.ok() || (at != 0 ? at % alignment == 0 : !needed)) return;
    status.code = Code::kInvalid;
    std::snprintf(status.message, sizeof status.message,
                  "%s: expected an address divisible by %d, got %#llx", name,
                  static_cast<int>(alignment), static_cast<unsigned long long>(at));
  };
  expect("x", o.x, 2, true);
  expect("y", o.y, 2, true);
  expect("bias", o.bias, 2, false);
  expect("workspace", o.workspace, 16, chain.parts > 1 || chain.products[0].splits > 1);
  char name[16];
  for (int k = 0; k < chain.parts; ++k) {
    std::snprintf(name, sizeof name, "core %d", k);
    expect(name, o.cores[k], chain.stored == Stored::kSame ? 2 : 1, true);
    if (k == chain.parts - 1) break;
    std::snprintf(name, sizeof name, "scale %d", k);
    expect(name, o.scales[k], 4, false);
  }
  return status;
}

}  // namespace mpo
