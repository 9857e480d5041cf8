#include "device_calls.h"

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "errors.h"

namespace mtrains {
namespace {

constexpr int kSuccess = 0, kNotReady = 600;
constexpr std::chrono::microseconds kSpin{2000}, kPause{20};
constexpr int kLooks = 64;  // between looks at the clock, and offers of the core

template <typename... Arguments>
int call(Handle function, Arguments... arguments) {
  return reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
}

void* pointer(Handle handle) { return reinterpret_cast<void*>(handle); }

void check(int status, const char* function) {
  if (status != kSuccess) {
    throw Error(ErrorKind::kDevice, std::string(function) + " failed with CUDA error " + std::to_string(status) +
                                        "; what is on the device is lost. Begin anew, from the last checkpoint");
  }
}

}  // namespace

DeviceCalls::DeviceCalls(const DeviceFunctions& functions) : functions_(functions) {
  for (Handle f : {functions.event_record, functions.stream_wait_event, functions.event_query, functions.graph_launch,
                   functions.get_last_error}) {
    if (f == 0) throw Error(ErrorKind::kConfiguration, "a function of the CUDA runtime has address 0; load the runtime first");
  }
}

void DeviceCalls::record(Handle event, Handle stream) const {
  check(call(functions_.event_record, pointer(event), pointer(stream)), "cudaEventRecord");
}

void DeviceCalls::wait(Handle event, Handle stream) const {
  check(call(functions_.stream_wait_event, pointer(stream), pointer(event), 0U), "cudaStreamWaitEvent");
}

void DeviceCalls::launch(Handle graph, Handle stream) const {
  check(call(functions_.graph_launch, pointer(graph), pointer(stream)), "cudaGraphLaunch");
}

bool DeviceCalls::done(Handle event) const {
  const int status = call(functions_.event_query, pointer(event));
  if (status == kNotReady) {
    call(functions_.get_last_error);  // it would be taken for a failure of what comes next
    return false;
  }
  check(status, "cudaEventQuery");
  return true;
}

void DeviceCalls::run(const std::vector<DeviceCall>& calls, Handle caller) const {
  for (const DeviceCall& c : calls) {
    const Handle stream = c.stream == kCaller ? caller : c.stream;
    switch (c.kind) {
      case DeviceCall::kRecord: record(c.what, stream); break;
      case DeviceCall::kWait: wait(c.what, stream); break;
      default: launch(c.what, stream);
    }
  }
}

bool wait_for_number(Handle address, std::int64_t number, std::int64_t microseconds) {
  using Clock = std::chrono::steady_clock;
  const std::atomic_ref<std::int64_t> there(*reinterpret_cast<std::int64_t*>(address));
  const auto start = Clock::now();
  for (;;) {
    for (int look = 0; look < kLooks; ++look) {
      if (there.load(std::memory_order_acquire) == number) return true;
    }
    const auto waited = Clock::now() - start;
    if (waited >= std::chrono::microseconds(microseconds)) return false;
    if (waited < kSpin) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kPause);
    }
  }
}

}  // namespace mtrains
