// Bindings of what the host does for a device.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "device_calls.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

namespace {

// A list of calls, made from Python once.
struct DeviceCallList {
  std::vector<DeviceCall> calls;
};

}  // namespace

void bind_device(nb::module_& m) {
  nb::class_<DeviceCallList>(m, "DeviceCallList")
      .def("__init__", [](DeviceCallList* self, const std::vector<std::tuple<int, Handle, Handle>>& calls) {
        new (self) DeviceCallList;
        for (const auto& [kind, what, stream] : calls) self->calls.push_back({kind, what, stream});
      });
  nb::class_<DeviceCalls> calls(m, "DeviceCalls");
  calls
      .def("__init__",
           [](DeviceCalls* self, Handle event_record, Handle stream_wait_event, Handle event_query, Handle graph_launch,
              Handle get_last_error) {
             new (self) DeviceCalls({event_record, stream_wait_event, event_query, graph_launch, get_last_error});
           },
           "event_record"_a, "stream_wait_event"_a, "event_query"_a, "graph_launch"_a, "get_last_error"_a)
      .def("record", &DeviceCalls::record, "event"_a, "stream"_a)
      .def("wait", &DeviceCalls::wait, "event"_a, "stream"_a)
      .def("launch", &DeviceCalls::launch, "graph"_a, "stream"_a)
      .def("done", &DeviceCalls::done, "event"_a)
      .def("run", [](const DeviceCalls& self, const DeviceCallList& list, Handle caller) { self.run(list.calls, caller); }, "calls"_a,
           "caller"_a, nb::call_guard<nb::gil_scoped_release>());
  calls.attr("RECORD") = static_cast<int>(DeviceCall::kRecord);
  calls.attr("WAIT") = static_cast<int>(DeviceCall::kWait);
  calls.attr("LAUNCH") = static_cast<int>(DeviceCall::kLaunch);
  calls.attr("CALLER") = DeviceCalls::kCaller;
  m.def("wait_for_number", &wait_for_number, "address"_a, "number"_a, "microseconds"_a, nb::call_guard<nb::gil_scoped_release>());
}
