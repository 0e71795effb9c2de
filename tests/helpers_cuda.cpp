// A CUDA that is not there: the least that PyTorch asks of a device before FakeTensorMode may trace work on it
// with a build for CPUs. Guard and streams do nothing, one device exists, no kernel is ever called.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

namespace {

const Device only_device(DeviceType::CUDA, 0);
const Stream only_stream(Stream::DEFAULT, only_device);

struct NoGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return only_device; }
  Device getDevice() const override { return only_device; }
  Stream getStream(Device) const noexcept override { return only_stream; }
  Stream getNewStream(Device, int) const override { return only_stream; }
  Stream exchangeStream(Stream) const noexcept override { return only_stream; }
  // Autograd orders the streams of its nodes by events.
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

const c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new NoGuard);

// PyTorch looks it up by this name.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

}  // namespace

using at::CUDAHooksRegistry, at::RegistererCUDAHooksRegistry;  // that the macro names
REGISTER_CUDA_HOOKS(CUDAHooks)
