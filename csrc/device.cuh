// The machine under thin.cuh on a GPU, compute capability 8.0 and later.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define MPO_DEVICE __device__ __forceinline__
#define MPO_UNROLL _Pragma("unroll")
#define MPO_UNROLL_BY_EIGHT _Pragma("unroll 8")
#define MPO_NO_UNROLL _Pragma("unroll 1")

namespace mpo {
namespace simt {

MPO_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
MPO_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
MPO_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
MPO_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
MPO_DEVICE void synchronize() { __syncthreads(); }

// Programmatic dependent launch: nothing where the launch did not ask for it, or the device is
// older.
MPO_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until all that was enqueued before is done and seen.
MPO_DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

MPO_DEVICE uint32_t permute(uint32_t word, uint32_t selector) {
  return __byte_perm(word, word, selector);
}

// Of what no kernel writes while this one runs.
MPO_DEVICE void load_constant(uint32_t (&to)[4], const char* from, bool inside) {
  const uint4 v = inside ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{};
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

MPO_DEVICE void load_constant(uint32_t (&to)[2], const char* from, bool inside) {
  const uint2 v = inside ? __ldg(reinterpret_cast<const uint2*>(from)) : uint2{};
  to[0] = v.x, to[1] = v.y;
}

template <int bytes>
MPO_DEVICE uint32_t load_scalar(const char* from) {
  if constexpr (bytes == 2) {
    return __ldg(reinterpret_cast<const unsigned short*>(from));
  } else {
    return __ldg(reinterpret_cast<const unsigned char*>(from));
  }
}

MPO_DEVICE float load_float(const float* from) { return __ldg(from); }

// Of what the kernel before wrote: from the second-level cache, behind the wait.
MPO_DEVICE void load_input(uint32_t (&to)[4], const char* from, bool inside) {
  const uint4 v = inside ? __ldcg(reinterpret_cast<const uint4*>(from)) : uint4{};
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

MPO_DEVICE uint32_t load_input_scalar(const char* from) {
  return __ldcg(reinterpret_cast<const unsigned short*>(from));
}

MPO_DEVICE float load_input_float(const float* from) { return __ldcg(from); }

MPO_DEVICE void load_input(float (&to)[8], const float* from, bool inside) {
  const float4* vectors = reinterpret_cast<const float4*>(from);
  const float4 low = inside ? __ldcg(vectors) : float4{};
  const float4 high = inside ? __ldcg(vectors + 1) : float4{};
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

MPO_DEVICE void store_scalar(char* to, uint32_t low) {
  *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(low);
}

MPO_DEVICE void store_float(float* to, float value) { *to = value; }

template <class Pair>
MPO_DEVICE uint32_t bits(Pair pair) {
  return *reinterpret_cast<uint32_t*>(&pair);
}

template <class Pair>
MPO_DEVICE Pair pair_of(uint32_t bits) {
  return *reinterpret_cast<Pair*>(&bits);
}

template <class E>
using PairOf = std::conditional_t<E::kExponentBits == 5, __half2, __nv_bfloat162>;

template <class E>
MPO_DEVICE uint32_t pack(float low, float high) {
  if constexpr (E::kExponentBits == 5) {
    return bits(__floats2half2_rn(low, high));
  } else {
    return bits(__floats2bfloat162_rn(low, high));
  }
}

template <class E>
MPO_DEVICE float unpack(uint32_t low) {
  return __low2float(pair_of<PairOf<E>>(low));
}

template <class E>
MPO_DEVICE uint32_t multiply(uint32_t x, uint32_t y) {
  return bits(__hmul2(pair_of<PairOf<E>>(x), pair_of<PairOf<E>>(y)));
}

template <class E>
MPO_DEVICE uint32_t subtract(uint32_t x, uint32_t y) {
  return bits(__hsub2(pair_of<PairOf<E>>(x), pair_of<PairOf<E>>(y)));
}

// c [16, 8] += a [16, 16] · b [16, 8]; fragments as the PTX manual has them for m16n8k16.
template <class E>
MPO_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (E::kExponentBits == 5) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace simt
}  // namespace mpo
