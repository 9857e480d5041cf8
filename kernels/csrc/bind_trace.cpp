#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "trace.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

void bind_trace(nb::module_& m) {
  m.def("trace_start", [](size_t most_events) { return Trace::shared().start(most_events); }, "most_events"_a);
  m.def("trace_stop", [] {
    uint64_t dropped = 0;
    std::vector<std::tuple<std::string, int64_t, int64_t, uint64_t, uint32_t, uint32_t>> events;
    for (const TraceEvent& e : Trace::shared().stop(&dropped)) events.emplace_back(e.what, e.begin_ns, e.end_ns, e.count, e.queue, e.lane);
    return std::make_tuple(events, dropped);
  });
}
