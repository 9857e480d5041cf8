// Bindings of what measures devices and memory with nothing above them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "io_probe.h"
#include "memory_probe.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

void bind_probes(nb::module_& m) {
  nb::class_<IoProbe>(m, "IoProbe")
      .def_ro("operations", &IoProbe::operations)
      .def_ro("seconds", &IoProbe::seconds)
      .def_ro("cpu_seconds", &IoProbe::cpu_seconds)
      .def_ro("latency_us_p50", &IoProbe::latency_us_p50)
      .def_ro("latency_us_p99", &IoProbe::latency_us_p99)
      .def_prop_ro("operations_per_s", [](const IoProbe& self) { return static_cast<double>(self.operations) / self.seconds; });
  m.def("random_io", &random_io, "files"_a, "block_bytes"_a, "depth"_a, "read_share"_a, "seconds"_a, "backend"_a = "", "seed"_a = 0,
        nb::call_guard<nb::gil_scoped_release>());

  nb::class_<MemoryProbe>(m, "MemoryProbe")
      .def_ro("read_bytes_per_s", &MemoryProbe::read_bytes_per_s)
      .def_ro("write_bytes_per_s", &MemoryProbe::write_bytes_per_s)
      .def_ro("rows_per_s", &MemoryProbe::rows_per_s)
      .def_ro("latency_ns", &MemoryProbe::latency_ns);
  m.def("probe_memory", &probe_memory, "folder"_a, "bytes"_a, "threads"_a, "row_bytes"_a, "seconds"_a, "seed"_a = 0,
        nb::call_guard<nb::gil_scoped_release>());
}
