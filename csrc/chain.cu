// The kernels: an instance for each element type, stored type and number of column tiles.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "device.cuh"
#include "chain.cuh"

namespace mpo {
namespace {

template <class E, class S, int NT>
__global__ void __launch_bounds__(kThreads, 1)
    chain_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) char shared[];
  chain<E, S, NT>(arguments, shared);
}

using Kernel = void (*)(Arguments);

template <class E, class S>
Kernel of_tiles(int tiles) {
  return tiles == 1   ? chain_kernel<E, S, 1>
         : tiles == 2 ? chain_kernel<E, S, 2>
                      : chain_kernel<E, S, 4>;
}

template <class E>
Kernel of_stored(Stored stored, int tiles) {
  return stored == Stored::kSame     ? of_tiles<E, Same>(tiles)
         : stored == Stored::kFloat8 ? of_tiles<E, Float8>(tiles)
                                     : of_tiles<E, Int8>(tiles);
}

Kernel kernel_of(const Schedule& s) {
  return s.element == Element::kFloat16 ? of_stored<Float16>(s.stored, s.column_tiles)
                                        : of_stored<BFloat16>(s.stored, s.column_tiles);
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

}  // namespace

Status limits_of_device(int device, Limits* limits) {
  int major = 0, minor = 0;
  for (const auto& [attribute, value] :
       {std::pair{cudaDevAttrComputeCapabilityMajor, &major},
        {cudaDevAttrComputeCapabilityMinor, &minor},
        {cudaDevAttrMultiProcessorCount, &limits->multiprocessors},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_memory}}) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return failed("cudaDeviceGetAttribute", error);
  }
  // Code made from older PTX has no clusters, whatever the device has.
  const DeviceGuard guard(device);
  cudaFuncAttributes code;
  const cudaError_t error = guard.error() != cudaSuccess
                                ? guard.error()
                                : cudaFuncGetAttributes(&code, chain_kernel<Float16, Same, 1>);
  if (error != cudaSuccess) {
    Status status = failed("architecture: no code for it in this library", error);
    status.code = Code::kUnsupported;
    return status;
  }
  // From 10.0 on all code is of one kind, and the device's own rates count.
  const int own = 10 * major + minor;
  limits->architecture = code.ptxVersion >= 100 ? own : std::min(own, code.ptxVersion);
  return {};
}

Status make_zeros(int device, int64_t count, void** zeros) {
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  const size_t bytes = static_cast<size_t>(count) * 4;
  if (error == cudaSuccess) error = cudaMalloc(zeros, bytes);
  if (error == cudaSuccess) error = cudaMemset(*zeros, 0, bytes);
  // Streams that do not wait for the default one may be the next to use them.
  if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
  return error == cudaSuccess ? Status{} : failed("workspace of the decode chain", error);
}

Status is_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return error == cudaSuccess ? Status{} : failed("cudaStreamIsCapturing", error);
}

Status launch(const Problem& problem, const Schedule& schedule, const Operands& operands,
              int device, void* stream) {
  Arguments arguments;
  const Status status = prepare(problem, schedule, operands, &arguments);
  if (!status.ok()) return status;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return failed("cudaSetDevice", guard.error());
  const Kernel kernel = kernel_of(schedule);
  // 48 KiB is what a block gets unasked.
  if (schedule.shared_memory > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, schedule.shared_memory);
    if (error != cudaSuccess) return failed("shared memory of the decode chain", error);
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(schedule.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = {static_cast<unsigned>(schedule.tiles), static_cast<unsigned>(schedule.splits),
                    1};
  config.blockDim = {kThreads, 1, 1};
  config.dynamicSmemBytes = static_cast<size_t>(schedule.shared_memory);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = schedule.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  return error == cudaSuccess ? Status{} : failed("launch of the decode chain", error);
}

}  // namespace mpo
