// A CUDA device guard and CUDA hooks that do nothing, for a build of PyTorch without CUDA. Autograd and FSDP ask for them
// when a tensor says that it is on a GPU, also when it is a fake tensor without memory.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

namespace {

constexpr DeviceIndex kNumDevices = 8;
thread_local DeviceIndex current = 0;

Stream default_stream(Device device) {
  return Stream(Stream::DEFAULT, Device(c10::kCUDA, device.index() < 0 ? current : device.index()));
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  Device exchangeDevice(Device device) const override {
    Device before(c10::kCUDA, current);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(c10::kCUDA, current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  Stream getStream(Device device) const noexcept override { return default_stream(device); }
  Stream getDefaultStream(Device device) const override { return default_stream(device); }
  Stream getNewStream(Device device, int = 0) const override { return default_stream(device); }
  Stream getStreamFromGlobalPool(Device device, bool = false) const override { return default_stream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return default_stream(stream.device()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return kNumDevices; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {

struct Hooks final : CUDAHooksInterface {
  explicit Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return false; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex deviceCount() const override { return kNumDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
};

C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)

}  // namespace at
