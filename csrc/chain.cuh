// The kernel of the decode chain, as a function of one thread. `simt` is the machine under it:
// device.cuh on a GPU, an emulation in the tests.
//
// A thread holds 8 × 8 elements of a core, m0 … m0+7 and k0 … k0+7, so a warp holds 64 × 32: lanes
// 4g … 4g+3 have m0 = 8g, and lane q of them k0 = 8q. Each piece is loaded straight into registers,
// once, as eight vectors along m or along k, and serves `mma` as operand A for every n. The order
// of m and of k within a piece is free, as long as the state (operand B) and the result follow: row
// g of the matrix instruction's tile t is m0 + 2t, row g + 8 is m0 + 2t + 1, and its columns 2q, 2q
// + 1, 2q + 8, 2q + 9 are four neighbouring k. So B is one vector of the state, and a thread's
// results are eight neighbouring m of one n, which are eight neighbouring k of the next state.
#pragma once

#include "chain.hpp"

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

// How a core is stored: `pair` makes two of its elements a word of E.
struct Same {
  static constexpr int kBytes = 2;
  // Elements `lo` of x and `hi` of y as a pair.
  template <class E, int lo, int hi>
  MPO_DEVICE static uint32_t pair(uint32_t x, uint32_t y) {
    return simt::permute(x, y, lo * 0x0022 + 0x10 + (hi * 0x2200 + 0x5400));
  }
};

struct Float8 {
  static constexpr int kBytes = 1;
  template <class E, int lo, int hi>
  MPO_DEVICE static uint32_t pair(uint32_t x, uint32_t y) {
    // The bits of e4m3 in the places of E's low exponent bits: off by a power of two, subnormals
    // too. Finite numbers only, which is what `quantize` makes.
    const uint32_t bytes = simt::permute(x, y, lo * 0x11 + (4 + hi) * 0x1100);
    const uint32_t magnitude = (bytes & 0x7f007f00u) >> (E::kExponentBits - 4);
    return simt::multiply<E>(magnitude | (bytes & 0x80008000u), E::kFloat8Factor);
  }
};

struct Int8 {
  static constexpr int kBytes = 1;
  template <class E, int lo, int hi>
  MPO_DEVICE static uint32_t pair(uint32_t x, uint32_t y) {
    // Low seven bits minus the sign bit's 128, each added to a number whose last place is 1: exact.
    const uint32_t bytes = simt::permute(x, y, lo * 0x11 + (4 + hi) * 0x1100);
    const uint32_t low = (bytes & 0x007f007fu) | E::kUnitPlace;
    const uint32_t sign = (bytes & 0x00800080u) | E::kUnitPlace;
    return simt::subtract<E>(low, sign);
  }
};

MPO_DEVICE void locate(Origin* at, const Schedule& s, int tile, int split) {
  for (int level = s.parts - 1; level >= 0; --level) {
    const Level& l = s.levels[level];
    at->out[level] = tile % l.out.blocks * l.out.block;
    tile /= l.out.blocks;
    at->from[level] = split % l.from.blocks * l.from.block;
    split /= l.from.blocks;
    at->in[level] = split % l.in.blocks * l.in.block;
    split /= l.in.blocks;
  }
  at->from[s.parts] = 0;
}

// A block's share of a core as a matrix [m, k].
struct Panel {
  const char* data;
  int m_stride, m_major_stride, k_stride, k_major_stride;  // elements
  int m_extent, m_majors, k_extent, k_majors;              // what is left from the origin on
  int m_tile, m_shift, k_shift;
};

MPO_DEVICE Panel panel_of(const Arguments& a, const Origin& at, int level, int element_bytes) {
  const Level& l = a.schedule.levels[level];
  const int out = l.out.extent - at.out[level], to = l.to.extent - at.from[level + 1];
  const int in = l.in.extent - at.in[level], from = l.from.extent - at.from[level];
  const int64_t origin =
      int64_t{at.out[level]} * l.out.stride + int64_t{at.from[level + 1]} * l.to.stride +
      int64_t{at.in[level]} * l.in.stride + int64_t{at.from[level]} * l.from.stride;
  Panel p;
  p.data = static_cast<const char*>(a.operands.cores[level]) + origin * element_bytes;
  p.m_stride = l.to_minor ? l.to.stride : l.out.stride;
  p.m_major_stride = l.to_minor ? l.out.stride : l.to.stride;
  p.m_extent = l.to_minor ? to : out;
  p.m_majors = l.to_minor ? out : to;
  p.k_stride = level > 0 ? l.from.stride : l.in.stride;
  p.k_major_stride = level > 0 ? l.in.stride : 0;
  p.k_extent = level > 0 ? from : in;
  p.k_majors = level > 0 ? in : 1;
  p.m_tile = l.m_tile;
  p.m_shift = l.m_shift;
  p.k_shift = l.k_shift;
  return p;
}

// 8 × 8 elements: words[k] of neighbouring m, or words[m] of neighbouring k.
template <class S>
struct Piece {
  uint32_t words[8][2 * S::kBytes];
};

template <class S, Access access>
MPO_DEVICE void load(Piece<S>& piece, const Panel& p, int m, int k) {
  const int m_major = m >> p.m_shift, k_major = k >> p.k_shift;
  const int m_minor = m - (m_major << p.m_shift), k_minor = k - (k_major << p.k_shift);
  const bool majors = m < p.m_tile && m_major < p.m_majors && k_major < p.k_majors;
  // A piece never crosses a major index: blocks of minor ones are eight or more. A core spans fewer
  // than 2^31 elements; what lies outside wraps around and is not read.
  const auto offset = [](int index, int stride) {
    return static_cast<uint32_t>(index) * static_cast<uint32_t>(stride);
  };
  const char* corner =
      p.data +
      size_t{S::kBytes} * (offset(m_major, p.m_major_stride) + offset(m_minor, p.m_stride) +
                           offset(k_major, p.k_major_stride) + offset(k_minor, p.k_stride));
  if constexpr (access == Access::kScalar) {
    constexpr int kPerWord = 4 / S::kBytes, kWords = 2 * S::kBytes;
    // A loop, each row pushed in from behind: all loads at once would not fit the registers.
    MPO_NO_UNROLL
    for (int e = 0; e < 8; ++e) {
      const char* row = corner + int64_t{e} * p.k_stride * S::kBytes;
      const int count = majors && k_minor + e < p.k_extent ? p.m_extent - m_minor : 0;
      MPO_UNROLL
      for (int w = 0; w < 7 * kWords; ++w) {
        piece.words[w / kWords][w % kWords] = piece.words[w / kWords + 1][w % kWords];
      }
      MPO_UNROLL
      for (int w = 0; w < kWords; ++w) piece.words[7][w] = 0;
      MPO_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (i >= count) continue;
        piece.words[7][i / kPerWord] |=
            simt::load_scalar<S::kBytes>(row + int64_t{i * p.m_stride} * S::kBytes)
            << (8 * S::kBytes * (i % kPerWord));
      }
    }
  } else {
    constexpr bool kM = access == Access::kAlongM;
    const bool inside = majors && m_minor < p.m_extent && k_minor < p.k_extent;
    const int left = kM ? p.k_extent - k_minor : p.m_extent - m_minor;
    const int64_t step = int64_t{kM ? p.k_stride : p.m_stride} * S::kBytes;
    MPO_UNROLL
    for (int e = 0; e < 8; ++e) {
      simt::load_vector<2 * S::kBytes>(piece.words[e], corner + e * step, inside && e < left);
    }
  }
}

// Elements (m, k) and (m, k + 1) of a piece in E.
template <class E, class S, Access access, int m, int k>
MPO_DEVICE uint32_t pair(const Piece<S>& piece) {
  constexpr int kPerWord = 4 / S::kBytes;
  if constexpr (access == Access::kAlongK) {
    const uint32_t word = piece.words[m][k / kPerWord];
    if constexpr (S::kBytes == 2) return word;
    return S::template pair<E, k % kPerWord, k % kPerWord + 1>(word, word);
  } else {
    return S::template pair<E, m % kPerWord, m % kPerWord>(piece.words[k][m / kPerWord],
                                                           piece.words[k + 1][m / kPerWord]);
  }
}

// acc[2t or 2t + 1][n] += the four k from 4h on of rows m = 2t and 2t + 1.
template <class E, class S, Access access, int NT, int h, int t>
MPO_DEVICE void multiply_rows(float (&acc)[4][NT][4], const Piece<S>& piece,
                              const uint32_t (&b)[NT][4]) {
  const uint32_t a[4] = {
      pair<E, S, access, 2 * t, 4 * h>(piece), pair<E, S, access, 2 * t + 1, 4 * h>(piece),
      pair<E, S, access, 2 * t, 4 * h + 2>(piece), pair<E, S, access, 2 * t + 1, 4 * h + 2>(piece)};
  MPO_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    simt::mma<E>(acc[t][nt], a, b[nt][2 * h], b[nt][2 * h + 1]);
  }
}

// acc += A[m …, k0 … k0 + chunk) · state, for 8 · NT of n; warps of one strip share the k.
// `fill` completes the state while the first pieces are on their way.
template <class E, class S, Access access, int NT, class Fill>
MPO_DEVICE void accumulate(float (&acc)[4][NT][4], const Panel& p, const Level& l,
                           const char* state, int m, int k0, int chunk, const Fill& fill) {
  const int lane = simt::thread() % 32, q = lane % 4;
  const int step = 32 * (kWarps >> l.strips_shift);
  int k = (simt::thread() / 32 >> l.strips_shift) * 32 + 8 * q;
  // What is on its way while a piece is multiplied: as much as the registers hold.
  constexpr int kAhead = access == Access::kScalar ? 0 : simt::kPiecesAhead<NT>;
  Piece<S> pieces[kAhead + 1];
  MPO_UNROLL
  for (int i = 0; i < kAhead; ++i) {
    if (k + i * step < chunk) load<S, access>(pieces[i], p, m, k0 + k + i * step);
  }
  fill();
  simt::synchronize();
  while (k < chunk) {
    MPO_UNROLL
    for (int i = 0; i <= kAhead; ++i) {
      if (k >= chunk) break;
      if (k + kAhead * step < chunk) {
        load<S, access>(pieces[(i + kAhead) % (kAhead + 1)], p, m, k0 + k + kAhead * step);
      }
      uint32_t b[NT][4];
      MPO_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        simt::load_shared(b[nt], state + 2 * ((8 * nt + lane / 4) * l.state_stride + k));
      }
      multiply_rows<E, S, access, NT, 0, 0>(acc, pieces[i], b);
      multiply_rows<E, S, access, NT, 0, 1>(acc, pieces[i], b);
      multiply_rows<E, S, access, NT, 0, 2>(acc, pieces[i], b);
      multiply_rows<E, S, access, NT, 0, 3>(acc, pieces[i], b);
      multiply_rows<E, S, access, NT, 1, 0>(acc, pieces[i], b);
      multiply_rows<E, S, access, NT, 1, 1>(acc, pieces[i], b);
      multiply_rows<E, S, access, NT, 1, 2>(acc, pieces[i], b);
      multiply_rows<E, S, access, NT, 1, 3>(acc, pieces[i], b);
      k += step;
    }
  }
}

// state[n, k] of level 0 for k0 … k0 + chunk: x, and zeros where it has no such column.
template <class E>
MPO_DEVICE void stage_x(const Arguments& a, const Origin& at, char* state, int k0, int chunk) {
  const Schedule& s = a.schedule;
  const Level& l = s.levels[0];
  // Neighbouring threads take neighbouring columns of x; a power of two of them, some idle.
  const bool along_k = l.x_stride == 1;
  const int run = a.x_vector ? 8 : 1;
  const int minors = along_k ? chunk / run : l.columns, majors = along_k ? l.columns : chunk;
  const char* x = static_cast<const char*>(a.operands.x);
  MPO_UNROLL_BY_FOUR
  for (int item = simt::thread(); item < majors << a.x_shift; item += kThreads) {
    const int minor = item & ((1 << a.x_shift) - 1), major = item >> a.x_shift;
    if (minor >= minors) continue;
    const int n = along_k ? major : minor, k = (along_k ? minor : major) * run;
    bool inside = k0 + k < l.in.extent;
    int64_t column = int64_t{k0 + k} * l.x_stride;
    int row = n;
    for (int level = s.parts - 1; level > 0; --level) {
      const Level& other = s.levels[level];
      const int digit = at.in[level] + (row & (other.in.block - 1));
      row >>= other.in_shift;
      inside = inside && digit < other.in.extent;
      column += int64_t{digit} * other.x_stride;
    }
    inside = inside && column < s.in_features;
    const char* from = x + 2 * (row * a.operands.x_row + column * a.operands.x_column);
    char* to = state + 2 * (n * l.state_stride + k);
    if (a.x_vector) {
      uint32_t words[4];
      simt::load_vector<4>(words, from, inside);
      simt::store_shared(to, words);
    } else {
      simt::store_scalar(to, inside ? simt::load_scalar<2>(from) : 0);
    }
  }
}

// Eight neighbouring m of column n, rounded once, where the next level reads them: in this block,
// or in all `ranks` of a cluster.
template <class E>
MPO_DEVICE void store_state(const Arguments& a, const Origin& at, char* shared, int level, int n,
                            int m, float (&v)[8], int ranks) {
  const Level &l = a.schedule.levels[level], &next = a.schedule.levels[level + 1];
  const float* scales = a.operands.scales[level];
  const int inner = n & ((1 << l.inner_shift) - 1);
  const int in = (n >> l.inner_shift) & (next.in.block - 1);
  const int outer = n >> l.inner_shift >> next.in_shift;
  const int major = m >> l.m_shift, minor = m - (major << l.m_shift);
  char* state = shared + next.state;
  const auto place = [&](int out, int bond) {
    const int row = (((outer << l.out_shift) + out) << l.inner_shift) + inner;
    return state + 2 * (row * next.state_stride + (in << next.k_shift) + bond);
  };
  if (scales != nullptr) {
    MPO_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int bond = at.from[level + 1] + (l.to_minor ? minor + e : major);
      v[e] *= bond < l.to.extent ? scales[bond] : 0.0f;
    }
  }
  if (l.to_minor) {
    const uint32_t words[4] = {simt::pack<E>(v[0], v[1]), simt::pack<E>(v[2], v[3]),
                               simt::pack<E>(v[4], v[5]), simt::pack<E>(v[6], v[7])};
    char* to = place(major, minor);
    if (ranks == 1) return simt::store_shared(to, words);
    for (int rank = 0; rank < ranks; ++rank) simt::store_remote(to, words, rank);
  } else {
    MPO_UNROLL
    for (int e = 0; e < 8; ++e) {
      char* to = place(minor + e, major);
      const uint32_t low = simt::pack<E>(v[e], 0);
      if (ranks == 1) simt::store_scalar(to, low);
      for (int rank = 0; rank < ranks && ranks > 1; ++rank) {
        simt::store_remote_scalar(to, low, rank);
      }
    }
  }
}

// `count` neighbouring m of column n to y, with the bias.
template <class E, int count>
MPO_DEVICE void store_y(const Arguments& a, const Origin& at, int n, int m,
                        const float (&v)[count]) {
  const Schedule& s = a.schedule;
  const int last = s.parts - 1;
  const Level& l = s.levels[last];
  int64_t column = int64_t{at.out[last] + m} * l.y_stride;
  bool inside = true;
  int row = n;
  for (int level = last - 1; level >= 0; --level) {
    const Level& other = s.levels[level];
    const int digit = at.out[level] + (row & (other.out.block - 1));
    row >>= other.out_shift;
    inside = inside && digit < other.out.extent;
    column += int64_t{digit} * other.y_stride;
  }
  MPO_UNROLL
  for (int e = 0; e < count; ++e, column += l.y_stride) {
    if (!inside || at.out[last] + m + e >= l.out.extent || column >= s.out_features) continue;
    float value = v[e];
    if (a.operands.bias != nullptr) {
      const char* bias = static_cast<const char*>(a.operands.bias) + 2 * column;
      value += simt::unpack<E>(simt::load_scalar<2>(bias));
    }
    char* to = static_cast<char*>(a.operands.y) + 2 * (int64_t{row} * s.out_features + column);
    simt::store_scalar(to, simt::pack<E>(value, 0));
  }
}

// The values of one tile of y from one split: [n, m].
MPO_DEVICE float* partial_tile(const Arguments& a, int tile, int split) {
  const Schedule& s = a.schedule;
  const Level& l = s.levels[s.parts - 1];
  return a.operands.partials + (int64_t{tile} * s.splits + split) * l.columns * l.m_tile;
}

// The block that comes last sums the splits of its tile, always in the same order.
template <class E>
MPO_DEVICE void sum_splits(const Arguments& a, const Origin& at, char* shared) {
  const Schedule& s = a.schedule;
  const Level& l = s.levels[s.parts - 1];
  const int tile = simt::block_x();
  int* counter = a.operands.counters + tile;
  int* arrived = &reinterpret_cast<Origin*>(shared)->arrived;
  simt::fence();
  simt::synchronize();
  if (simt::thread() == 0) *arrived = simt::increment(counter);
  simt::synchronize();
  if (*arrived != s.splits - 1) return;
  simt::fence();
  const float* first = partial_tile(a, tile, 0);
  const int size = l.columns * l.m_tile;
  for (int item = 4 * simt::thread(); item < size; item += 4 * kThreads) {
    float total[4] = {0, 0, 0, 0};
    MPO_UNROLL_BY_FOUR
    for (int split = 0; split < s.splits; ++split) {
      float v[4];
      simt::load_partial(v, first + int64_t{split} * size + item);
      MPO_UNROLL
      for (int e = 0; e < 4; ++e) total[e] += v[e];
    }
    store_y<E>(a, at, item / l.m_tile, item % l.m_tile, total);
  }
  if (simt::thread() == 0) *counter = 0;
}

MPO_DEVICE void add(float (&v)[8], const float (&part)[8]) {
  MPO_UNROLL
  for (int e = 0; e < 8; ++e) v[e] += part[e];
}

template <class E, class S, int NT>
MPO_DEVICE void chain(const Arguments& a, char* shared) {
  const Schedule& s = a.schedule;
  Origin* origin = reinterpret_cast<Origin*>(shared);
  if (simt::thread() == 0) locate(origin, s, simt::block_x(), simt::block_y());
  simt::synchronize();
  const Origin& at = *origin;
  const int lane = simt::thread() % 32, warp = simt::thread() / 32;
  for (int level = 0; level < s.parts; ++level) {
    const Level& l = s.levels[level];
    const Panel panel = panel_of(a, at, level, S::kBytes);
    const int strips = 1 << l.strips_shift, sharing = kWarps >> l.strips_shift;
    const int strip = warp & (strips - 1);
    char* state = shared + l.state;
    // A cluster shares the first product: its blocks differ in the last digit of y alone.
    const int ranks = level == 0 ? s.cluster : 1;
    const int begin = ranks > 1 ? simt::cluster_rank() * s.slice : 0;
    const int end = ranks > 1 && begin + s.slice < l.depth ? begin + s.slice : l.depth;
    const auto sink = [&](int n, int m, float (&v)[8]) {
      if (n >= l.columns || m >= l.m_tile) return;
      if (level + 1 < s.parts) {
        store_state<E>(a, at, shared, level, n, m, v, ranks);
      } else if (s.splits == 1) {
        store_y<E>(a, at, n, m, v);
      } else {
        simt::store_floats(partial_tile(a, simt::block_x(), simt::block_y()) + n * l.m_tile + m, v);
      }
    };
    for (int m0 = 0; m0 < l.m_tile; m0 += 64 * strips) {
      for (int n0 = 0; n0 < l.columns; n0 += 8 * NT) {
        const int m = m0 + 64 * strip + 8 * (lane / 4);
        float acc[4][NT][4] = {};
        for (int k0 = begin; k0 < end; k0 += l.chunk) {
          const bool missing = level == 0 && (m0 + n0 == 0 || l.chunk < end - begin);
          const int chunk = end - k0 < l.chunk ? end - k0 : l.chunk;
          const auto fill = [&] {
            if (!missing) return;
            simt::synchronize();  // every warp is done with what is there
            stage_x<E>(a, at, state, k0, chunk);
          };
          const char* rows = state + 2 * n0 * l.state_stride;
          if (l.access == Access::kAlongM) {
            accumulate<E, S, Access::kAlongM, NT>(acc, panel, l, rows, m, k0, chunk, fill);
          } else if (l.access == Access::kAlongK) {
            accumulate<E, S, Access::kAlongK, NT>(acc, panel, l, rows, m, k0, chunk, fill);
          } else {
            accumulate<E, S, Access::kScalar, NT>(acc, panel, l, rows, m, k0, chunk, fill);
          }
        }
        if (sharing == 1 && ranks == 1) {
          MPO_UNROLL
          for (int nt = 0; nt < NT; ++nt) {
            MPO_UNROLL
            for (int c = 0; c < 2; ++c) {
              float v[8] = {acc[0][nt][c], acc[0][nt][c + 2], acc[1][nt][c], acc[1][nt][c + 2],
                            acc[2][nt][c], acc[2][nt][c + 2], acc[3][nt][c], acc[3][nt][c + 2]};
              sink(n0 + 8 * nt + 2 * (lane % 4) + c, m, v);
            }
          }
          continue;
        }
        // Warps that shared the k of a strip: [warp of the strip, n, m] through shared memory.
        float* scratch = reinterpret_cast<float*>(shared + s.scratch);
        const int width = 64 * strips;
        MPO_UNROLL
        for (int nt = 0; nt < NT; ++nt) {
          MPO_UNROLL
          for (int c = 0; c < 2; ++c) {
            const int n = (warp >> l.strips_shift) * 8 * NT + 8 * nt + 2 * (lane % 4) + c;
            float* to = scratch + n * width + 64 * strip + 8 * (lane / 4);
            const float v[8] = {acc[0][nt][c], acc[0][nt][c + 2], acc[1][nt][c], acc[1][nt][c + 2],
                                acc[2][nt][c], acc[2][nt][c + 2], acc[3][nt][c], acc[3][nt][c + 2]};
            simt::store_floats(to, v);
          }
        }
        simt::synchronize();
        float* exchange = reinterpret_cast<float*>(shared + s.exchange);
        const int per_column = 8 * strips, items = NT * width;
        for (int item = simt::thread(); item < items; item += kThreads) {
          float v[8] = {};
          for (int w = 0; w < sharing; ++w) {
            float part[8];
            simt::load_floats(part, scratch + (w * items + item) * 8);
            add(v, part);
          }
          if (ranks == 1) {
            sink(n0 + (item >> (l.strips_shift + 3)), m0 + (item & (per_column - 1)) * 8, v);
          } else {
            simt::store_floats(exchange + item * 8, v);
          }
        }
        if (ranks == 1) continue;
        simt::synchronize_cluster();
        // Each block sums its share of the items over the cluster, and gives it to all.
        const int first = simt::cluster_rank() + ranks * simt::thread();
        for (int item = first; item < items; item += ranks * kThreads) {
          float v[8] = {};
          MPO_UNROLL_BY_FOUR
          for (int rank = 0; rank < ranks; ++rank) {
            float part[8];
            simt::load_remote(part, exchange + item * 8, rank);
            add(v, part);
          }
          sink(n0 + (item >> (l.strips_shift + 3)), m0 + (item & (per_column - 1)) * 8, v);
        }
        simt::synchronize_cluster();  // the state is whole, and nobody reads the exchange any more
      }
    }
  }
  if (s.splits > 1) sum_splits<E>(a, at, shared);
}

}  // namespace mpo
