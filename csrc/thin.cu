// The kernels: an instance for each element type, stored type, number of groups and column tiles.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "device.cuh"
#include "launch.hpp"

namespace mpo {
namespace {

template <class E, class S, int G, int NT>
__global__ void __launch_bounds__(kThreads, 2) thin_kernel(const __grid_constant__ Arguments a) {
  __shared__ float shared[kSharedFloats<NT>];
  thin<E, S, G, NT>(a, shared);
}

template <class E>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ Sum s) {
  sum<E>(s);
}

template <class E, class S, int G, int NT>
auto kernel_of(Instance<E, S, G, NT>) {
  return thin_kernel<E, S, G, NT>;
}

dim3 grid_of(const Product& p) {
  const auto blocks = [](int size, int tile) {
    return static_cast<unsigned>((size + tile - 1) / tile);
  };
  return dim3(blocks(p.m, p.m_tile()), blocks(p.columns, 8 * p.column_tiles),
              static_cast<unsigned>(p.splits));
}

Status failed(const char* what, cudaError_t error) {
  (void)cudaGetLastError();  // not to be found by the next call of somebody else
  Status status{Code::kFailed};
  std::snprintf(status.message, sizeof status.message, "%s: %s", what, cudaGetErrorString(error));
  return status;
}

// The caller's current device comes back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

template <class Argument>
Status start(void (*kernel)(Argument), dim3 grid, int threads, bool early, void* stream,
             const Argument& argument) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, argument);
  return error == cudaSuccess ? Status{} : failed("launch of a thin product", error);
}

template <class E>
Status launch_as(const Chain& chain, const Operands& operands, void* stream) {
  const auto thin = [&](auto instance, const Arguments& a, bool early) {
    return start(kernel_of(instance), grid_of(a.product), kThreads, early && chain.programmatic,
                 stream, a);
  };
  const auto add = [&](const Sum& s) {
    const dim3 grid(static_cast<unsigned>((s.size + kSumThreads - 1) / kSumThreads));
    return start(sum_kernel<E>, grid, kSumThreads, chain.programmatic, stream, s);
  };
  return enqueue<E>(chain, operands, thin, add);
}

}  // namespace

Status limits_of_device(int device, int* architecture, int* multiprocessors) {
  int major = 0, minor = 0;
  for (const auto& [attribute, value] : {std::pair{cudaDevAttrComputeCapabilityMajor, &major},
                                         {cudaDevAttrComputeCapabilityMinor, &minor},
                                         {cudaDevAttrMultiProcessorCount, multiprocessors}}) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return failed("cudaDeviceGetAttribute", error);
  }
  // Code made from older PTX waits for nothing by itself, whatever the device can do.
  const DeviceGuard guard(device);
  cudaFuncAttributes code;
  const cudaError_t error = guard.error() != cudaSuccess
                                ? guard.error()
                                : cudaFuncGetAttributes(&code, sum_kernel<Float16>);
  if (error != cudaSuccess) {
    Status status = failed("architecture: no code for it in this library", error);
    status.code = Code::kUnsupported;
    return status;
  }
  *architecture = std::min(10 * major + minor, code.ptxVersion);
  return {};
}

Status launch(const Chain& chain, const Operands& operands, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return failed("cudaSetDevice", guard.error());
  return chain.element == Element::kFloat16 ? launch_as<Float16>(chain, operands, stream)
                                            : launch_as<BFloat16>(chain, operands, stream);
}

}  // namespace mpo
