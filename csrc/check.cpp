// Whether a chain is one that the kernels compute: plain C++, needs no device.
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
  if (chain.parts < 1 || chain.parts > kMaxParts)
    return invalid(-1, "parts", chain.parts, "1 to 3");
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
    const int64_t column_blocks = (p.columns + 8 * p.column_tiles - 1) / (8 * p.column_tiles);
    if (column_blocks > 65535) return invalid(k, "columns", p.columns, "65535 tiles at most");
    if (p.splits > 65535) return invalid(k, "splits", p.splits, "65535 at most");
    if (p.shares !=
        (k == 0 || chain.products[k - 1].splits == 1 ? 0 : chain.products[k - 1].splits)) {
      return invalid(k, "shares", p.shares, "those that the product before makes");
    }
  }
  return {};
}

}  // namespace mpo
