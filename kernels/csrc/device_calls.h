// Calls of the CUDA runtime from lists that were prepared once, so that what the host does for a batch is one call from Python; and the
// wait for a number that a device writes into host memory.
//
// Nothing here is linked with CUDA: the functions come as addresses from whoever has loaded the runtime, which is PyTorch, so that the
// core is built and loads on machines without. Streams, events and graphs are handles, whose owners keep them alive. The list's functions
// are called in its order; the first that fails ends it.
#pragma once

#include <cstdint>
#include <vector>

namespace mtrains {

using Handle = std::uint64_t;

// The addresses of cudaEventRecord, cudaStreamWaitEvent, cudaEventQuery, cudaGraphLaunch and cudaGetLastError.
struct DeviceFunctions {
  Handle event_record, stream_wait_event, event_query, graph_launch, get_last_error;
};

struct DeviceCall {
  enum Kind : int { kRecord, kWait, kLaunch };
  int kind;
  Handle what;    // an event, or an executable graph
  Handle stream;  // or kCaller
};

class DeviceCalls {
 public:
  static constexpr Handle kCaller = ~Handle{0};  // the stream that ``run`` is given

  // Throws kConfiguration for a missing function.
  explicit DeviceCalls(const DeviceFunctions& functions);

  // Each throws kDevice for what the runtime reports.
  void record(Handle event, Handle stream) const;
  void wait(Handle event, Handle stream) const;
  void launch(Handle graph, Handle stream) const;
  bool done(Handle event) const;
  void run(const std::vector<DeviceCall>& calls, Handle caller) const;

 private:
  DeviceFunctions functions_;
};

// Whether the number at an address became ``number`` within so many microseconds.
bool wait_for_number(Handle address, std::int64_t number, std::int64_t microseconds);

}  // namespace mtrains
