// The kernel of a thin product, as a function of one thread. `simt` is the machine under it:
// device.cuh on a GPU, an emulation in the tests.
//
// A warp multiplies 16 m by 32 · groups of k, by `mma` m16n8k16 with the weight as its rows and the
// few columns as its columns. A block's share of the weight is on its way to registers before the
// state is there, all of it at once; then the kernel after this one may begin, and then the one
// before is waited for. The order of k within a sum is free as long as both operands have the same:
// lane q of a row takes eight neighbours, which are one vector of the weight and one of the state.
#pragma once

#include "thin.hpp"

namespace mpo {

// What is needed of an element's bits; pairs of them fill a word.
struct Float16 {
  static constexpr int kExponentBits = 5;
  static constexpr uint32_t kFloat8Factor = 0x5c005c00u;  // 2^8
  static constexpr uint32_t kUnitPlace = 0x64006400u;     // 1024, whose last place is 1
};

struct BFloat16 {
  static constexpr int kExponentBits = 8;
  static constexpr uint32_t kFloat8Factor = 0x7b807b80u;  // 2^120
  static constexpr uint32_t kUnitPlace = 0x43004300u;     // 128, whose last place is 1
};

// How a core is stored: eight elements are a vector, of which `widened` makes pairs of E.
struct Same {
  static constexpr int kBytes = 2;
};

template <class E, class S>
MPO_DEVICE void widened(uint32_t (&to)[4], const uint32_t (&vector)[2 * S::kBytes]) {
  MPO_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (S::kBytes == 2) {
      to[w] = vector[w];
    } else {  // each byte in both halves of its element
      to[w] = S::template pair<E>(simt::permute(vector[w / 2], w % 2 == 0 ? 0x1100u : 0x3322u));
    }
  }
}

struct Float8 {
  static constexpr int kBytes = 1;
  template <class E>
  MPO_DEVICE static uint32_t pair(uint32_t bytes) {
    // The bits of e4m3 in the places of E's low exponent bits: off by a power of two, subnormals
    // too. Finite numbers only, which is what `quantize` makes.
    const uint32_t magnitude = (bytes & 0x7f007f00u) >> (E::kExponentBits - 4);
    return simt::multiply<E>(magnitude | (bytes & 0x80008000u), E::kFloat8Factor);
  }
};

struct Int8 {
  static constexpr int kBytes = 1;
  template <class E>
  MPO_DEVICE static uint32_t pair(uint32_t bytes) {
    // Low seven bits minus the sign bit's 128, each added to a number whose last place is 1: exact.
    const uint32_t low = (bytes & 0x007f007fu) | E::kUnitPlace;
    const uint32_t sign = (bytes & 0x00800080u) | E::kUnitPlace;
    return simt::subtract<E>(low, sign);
  }
};

// `count` of eight elements, zeros behind them, pushed in one by one.
template <int bytes, class Load>
MPO_DEVICE void gather(uint32_t (&to)[2 * bytes], int count, Load load) {
  MPO_UNROLL
  for (int w = 0; w < 2 * bytes; ++w) to[w] = 0;
  MPO_NO_UNROLL
  for (int e = 7; e >= 0; --e) {
    MPO_UNROLL
    for (int w = 2 * bytes - 1; w > 0; --w) {
      to[w] = to[w] << 8 * bytes | to[w - 1] >> (32 - 8 * bytes);
    }
    to[0] = to[0] << 8 * bytes | (e < count ? load(e) : 0u);
  }
}

// A column of the state: where it begins, and how many of its elements are no padding.
struct Column {
  int offset, limit;
};

MPO_DEVICE Column column_of(const Product& p, int c) {
  const int c2 = c % p.c2, major = c / p.c2, c1 = major % p.c1;
  const int position = c1 * p.state_c1 + c2 * p.state_c2, left = p.state_limit - position;
  const int limit = left <= 0 || c >= p.columns ? 0 : (left - 1) / p.state_k + 1;
  return {major / p.c1 * p.state_c0 + position, limit < p.k ? limit : p.k};
}

// Eight neighbouring k of each group from `k0` on, as pairs of E: vectors, all loads first.
template <class E, int G>
MPO_DEVICE void load_state(uint32_t (&to)[G][4], const Arguments& a, const Column& column, int k0) {
  const char* from = static_cast<const char*>(a.state) + 2 * int64_t{column.offset + k0};
  MPO_UNROLL
  for (int group = 0; group < G; ++group) {
    const int k = kGroup * group;
    simt::load_input(to[group], from + 2 * k, k0 + k < column.limit);
  }
}

// The same of a state in shares, which are added up.
template <class E, int G>
MPO_DEVICE void load_shares(uint32_t (&to)[G][4], const Arguments& a, const Column& column,
                            int k0) {
  float sums[G][8] = {};
  const float* from = static_cast<const float*>(a.state) + column.offset + k0;
  MPO_NO_UNROLL
  for (int share = 0; share < a.product.shares; ++share, from += a.product.state_share) {
    float values[G][8];
    MPO_UNROLL
    for (int group = 0; group < G; ++group) {
      const int k = kGroup * group;
      simt::load_input(values[group], from + k, k0 + k < column.limit);
    }
    MPO_UNROLL
    for (int group = 0; group < G; ++group) {
      MPO_UNROLL
      for (int e = 0; e < 8; ++e) sums[group][e] += values[group][e];
    }
  }
  MPO_UNROLL
  for (int group = 0; group < G; ++group) {
    MPO_UNROLL
    for (int w = 0; w < 4; ++w) {
      to[group][w] = simt::pack<E>(sums[group][2 * w], sums[group][2 * w + 1]);
    }
  }
}

// The same for one group, an element at a time.
template <class E>
MPO_DEVICE void gather_state(uint32_t (&to)[4], const Arguments& a, const Column& column, int k) {
  const Product& p = a.product;
  gather<2>(to, column.limit - k, [&](int e) {
    const int64_t offset = column.offset + int64_t{k + e} * p.state_k;
    if (p.shares == 0) {
      return simt::load_input_scalar(static_cast<const char*>(a.state) + 2 * offset);
    }
    float sum = 0.0f;
    MPO_NO_UNROLL
    for (int share = 0; share < p.shares; ++share) {
      const float* of_share = static_cast<const float*>(a.state) + share * p.state_share;
      sum += simt::load_input_float(of_share + offset);
    }
    return simt::pack<E>(sum, 0.0f);
  });
}

template <class E>
MPO_DEVICE void multiply(float (&sums)[4], const uint32_t (&low)[4], const uint32_t (&high)[4],
                         const uint32_t (&state)[4]) {
  simt::mma<E>(sums, {low[0], high[0], low[1], high[1]}, state[0], state[1]);
  simt::mma<E>(sums, {low[2], high[2], low[3], high[3]}, state[2], state[3]);
}

template <class E>
MPO_DEVICE void store(const Arguments& a, int m, int c, float value) {
  const Product& p = a.product;
  const int minor = m % p.m_minor, c2 = c % p.c2, major = c / p.c2, c1 = major % p.c1;
  const int position =
      m / p.m_minor * p.out_major + minor * p.out_minor + c1 * p.out_c1 + c2 * p.out_c2;
  if (position >= p.out_limit) return;
  const int64_t offset = major / p.c1 * int64_t{p.out_c0} + position;
  if (a.scale != nullptr) value *= simt::load_float(a.scale + minor);
  if (p.splits > 1) {
    simt::store_float(static_cast<float*>(a.out) + simt::block_z() * p.out_share + offset, value);
    return;
  }
  if (a.bias != nullptr) {
    value += simt::unpack<E>(simt::load_scalar<2>(static_cast<const char*>(a.bias) + 2 * position));
  }
  simt::store_scalar(static_cast<char*>(a.out) + 2 * offset, simt::pack<E>(value, 0.0f));
}

template <int NT>
constexpr int kSharedFloats = kWarps * 16 * 8 * NT;

template <class E, class S, int G, int NT>
MPO_DEVICE void thin(const Arguments& a, float* shared) {
  const Product& p = a.product;
  const int lane = simt::thread() % 32, warp = simt::thread() / 32, g = lane / 4, q = lane % 4;
  const int of_k = warp % p.warps_k, of_m = warp / p.warps_k, m_tile = 16 * (kWarps / p.warps_k);
  const int m0 = simt::block_x() * m_tile, c0 = simt::block_y() * 8 * NT;
  const int step = kGroup * G * p.warps_k;  // of the block's walk over its share of k
  const int k0 = simt::block_z() * p.steps * step + of_k * kGroup * G + 8 * q;
  const int end = (simt::block_z() + 1) * p.steps * step, stop = end < p.k ? end : p.k;

  const char* rows[2];
  bool inside[2];
  MPO_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int m = m0 + of_m * 16 + half * 8 + g, major = m / p.m_minor, minor = m % p.m_minor;
    const int64_t offset = major * int64_t{p.weight_major} + minor * int64_t{p.weight_minor};
    rows[half] = static_cast<const char*>(a.weight) + S::kBytes * offset;
    inside[half] = m < p.m;
  }
  Column columns[NT];
  MPO_UNROLL
  for (int t = 0; t < NT; ++t) columns[t] = column_of(p, c0 + 8 * t + g);
  float sums[NT][4] = {};

  if (NT > 1 || a.vectors) {
    uint32_t weight[G][2][2 * S::kBytes];
    const auto load_weight = [&](int k) {
      MPO_UNROLL
      for (int group = 0; group < G; ++group) {
        MPO_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int at = k + kGroup * group;
          simt::load_constant(weight[group][half], rows[half] + int64_t{at} * S::kBytes,
                              inside[half] && at < stop);
        }
      }
    };
    load_weight(k0);
    simt::let_next_start();
    simt::wait_for_inputs();
    MPO_NO_UNROLL
    for (int k = k0; k < stop + 8 * q; k += step) {
      uint32_t state[NT][G][4];
      MPO_UNROLL
      for (int t = 0; t < NT; ++t) {
        if (NT > 1 || p.shares == 0) {
          load_state<E, G>(state[t], a, columns[t], k);
        } else {
          load_shares<E, G>(state[t], a, columns[t], k);
        }
      }
      MPO_UNROLL
      for (int group = 0; group < G; ++group) {
        uint32_t low[4], high[4];
        widened<E, S>(low, weight[group][0]);
        widened<E, S>(high, weight[group][1]);
        MPO_UNROLL
        for (int t = 0; t < NT; ++t) multiply<E>(sums[t], low, high, state[t][group]);
      }
      if (k + step < stop + 8 * q) load_weight(k + step);
    }
  } else {
    // Sizes, strides or addresses that are no multiples of a vector: right, and slow, by one tile.
    simt::let_next_start();
    simt::wait_for_inputs();
    MPO_NO_UNROLL
    for (int k = k0; k < stop + 8 * q; k += step) {
      MPO_NO_UNROLL
      for (int at = k; at < k + kGroup * G; at += kGroup) {
        uint32_t weight[2][2 * S::kBytes], low[4], high[4];
        MPO_UNROLL
        for (int half = 0; half < 2; ++half) {
          const char* from = rows[half] + int64_t{at} * S::kBytes;
          gather<S::kBytes>(weight[half], inside[half] ? stop - at : 0, [&](int e) {
            return simt::load_scalar<S::kBytes>(from + e * S::kBytes);
          });
        }
        widened<E, S>(low, weight[0]);
        widened<E, S>(high, weight[1]);
        uint32_t state[4];
        gather_state<E>(state, a, columns[0], at);
        multiply<E>(sums[0], low, high, state);
      }
    }
  }

  // A thread holds rows g and g + 8 of columns 2q and 2q + 1.
  MPO_UNROLL
  for (int t = 0; t < NT; ++t) {
    float* of_warp = shared + (warp * 8 * NT + 8 * t + 2 * q) * 16 + g;
    of_warp[0] = sums[t][0], of_warp[16] = sums[t][1];
    of_warp[8] = sums[t][2], of_warp[24] = sums[t][3];
  }
  simt::synchronize();
  MPO_NO_UNROLL
  for (int i = simt::thread(); i < m_tile * 8 * NT; i += kThreads) {
    const int m = i % m_tile, c = i / m_tile;
    if (m0 + m >= p.m || c0 + c >= p.columns) continue;
    const float* first = shared + (m / 16 * p.warps_k * 8 * NT + c) * 16 + m % 16;
    float total = 0.0f;
    MPO_UNROLL
    for (int of = 0; of < kWarps; ++of) {
      if (of < p.warps_k) total += first[of * 8 * NT * 16];
    }
    store<E>(a, m0 + m, c0 + c, total);
  }
}

template <class E>
MPO_DEVICE void sum(const Sum& s) {
  const int64_t i = int64_t{simt::block_x()} * kSumThreads + simt::thread();
  simt::let_next_start();
  simt::wait_for_inputs();
  if (i >= s.size) return;
  float total = 0.0f;
  MPO_UNROLL_BY_EIGHT
  for (int share = 0; share < s.splits; ++share) {
    total += simt::load_input_float(s.shares + share * s.size + i);
  }
  if (s.bias != nullptr) {
    const char* bias = static_cast<const char*>(s.bias) + 2 * (i % s.out_features);
    total += simt::unpack<E>(simt::load_scalar<2>(bias));
  }
  simt::store_scalar(static_cast<char*>(s.y) + 2 * i, simt::pack<E>(total, 0.0f));
}

}  // namespace mpo
