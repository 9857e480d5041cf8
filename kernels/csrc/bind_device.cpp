// Bindings of what the host does for a device.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>

#include "device_calls.h"
#include "graph_numbers.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

namespace {

std::vector<std::string> as_strings(const std::vector<nb::bytes>& numbers) {
  std::vector<std::string> strings;
  for (const nb::bytes& n : numbers) strings.emplace_back(n.c_str(), n.size());
  return strings;
}

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
  nb::class_<GraphNumbers>(m, "GraphNumbers")
      .def("__init__",
           [](GraphNumbers* self, const std::vector<Handle>& functions, Handle graph, Handle other, const std::vector<nb::bytes>& numbers,
              const std::vector<nb::bytes>& others) {
             const GraphFunctions named{functions.at(0), functions.at(1), functions.at(2), functions.at(3), functions.at(4)};
             new (self) GraphNumbers(named, graph, other, as_strings(numbers), as_strings(others));
           },
           "functions"_a, "graph"_a, "other"_a, "numbers"_a, "others"_a)
      .def("set", [](GraphNumbers& self, Handle executable, const std::vector<nb::bytes>& numbers) { self.set(executable, as_strings(numbers)); },
           "executable"_a, "numbers"_a)
      .def_prop_ro("places", &GraphNumbers::places);
  m.def("wait_for_number", &wait_for_number, "address"_a, "number"_a, "microseconds"_a, nb::call_guard<nb::gil_scoped_release>());
}
