// The machine under chain.cuh on a GPU, compute capability 8.0 and later.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define MPO_DEVICE __device__ __forceinline__
#define MPO_UNROLL _Pragma("unroll")
#define MPO_UNROLL_BY_FOUR _Pragma("unroll 4")
#define MPO_NO_UNROLL _Pragma("unroll 1")

namespace mpo {

namespace simt {

// The compiler takes more registers for the same code from compute capability 10.0 on.
template <int NT>
#if __CUDA_ARCH__ >= 1000
constexpr int kPiecesAhead = NT == 4 ? 0 : 1;
#else
constexpr int kPiecesAhead = NT == 1 ? 2 : 1;
#endif

MPO_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
MPO_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
MPO_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
MPO_DEVICE void synchronize() { __syncthreads(); }
MPO_DEVICE void fence() { __threadfence(); }
MPO_DEVICE int increment(int* counter) { return atomicAdd(counter, 1); }

MPO_DEVICE uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
  return __byte_perm(x, y, selector);
}

template <int words>
MPO_DEVICE void load_vector(uint32_t (&to)[words], const char* from, bool inside) {
  if constexpr (words == 4) {
    const uint4 v = inside ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{};
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const uint2 v = inside ? __ldg(reinterpret_cast<const uint2*>(from)) : uint2{};
    to[0] = v.x, to[1] = v.y;
  }
}

template <int bytes>
MPO_DEVICE uint32_t load_scalar(const char* from) {
  if constexpr (bytes == 2) {
    return __ldg(reinterpret_cast<const unsigned short*>(from));
  } else {
    return __ldg(reinterpret_cast<const unsigned char*>(from));
  }
}

MPO_DEVICE void store_scalar(char* to, uint32_t low) {
  *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(low);
}

MPO_DEVICE void load_shared(uint32_t (&to)[4], const char* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

MPO_DEVICE void store_shared(char* to, const uint32_t (&v)[4]) {
  *reinterpret_cast<uint4*>(to) = uint4{v[0], v[1], v[2], v[3]};
}

MPO_DEVICE void store_floats(float* to, const float (&v)[8]) {
  reinterpret_cast<float4*>(to)[0] = float4{v[0], v[1], v[2], v[3]};
  reinterpret_cast<float4*>(to)[1] = float4{v[4], v[5], v[6], v[7]};
}

MPO_DEVICE void load_floats(float (&to)[8], const float* from) {
  const float4* v = reinterpret_cast<const float4*>(from);
  to[0] = v[0].x, to[1] = v[0].y, to[2] = v[0].z, to[3] = v[0].w;
  to[4] = v[1].x, to[5] = v[1].y, to[6] = v[1].z, to[7] = v[1].w;
}

// Blocks of a cluster share nothing on older devices, where a cluster is one block.
MPO_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

MPO_DEVICE void synchronize_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}

// The same place in another block's shared memory.
MPO_DEVICE uint32_t remote(const void* place, int rank) {
  uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(place))), "r"(rank));
#endif
  return address;
}

MPO_DEVICE void load_remote(float (&to)[8], const float* from, int rank) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = remote(from, rank);
  for (int half = 0; half < 2; ++half) {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[4 * half]), "=f"(to[4 * half + 1]), "=f"(to[4 * half + 2]),
                   "=f"(to[4 * half + 3])
                 : "r"(address + 16 * half)
                 : "memory");
  }
#else
  load_floats(to, from);
#endif
}

MPO_DEVICE void store_remote(char* to, const uint32_t (&v)[4], int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote(to, rank)),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
#else
  store_shared(to, v);
#endif
}

MPO_DEVICE void store_remote_scalar(char* to, uint32_t low, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(remote(to, rank)),
               "h"(static_cast<unsigned short>(low))
               : "memory");
#else
  store_scalar(to, low);
#endif
}

// Another multiprocessor wrote them: not through the first-level cache.
MPO_DEVICE void load_partial(float (&to)[4], const float* from) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

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
