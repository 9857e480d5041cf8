// Bindings of the profiler of one table (table_profiler.h).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include "table_profiler.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

namespace {

template <class Index>
using Ids = nb::ndarray<const Index, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class Index>
void push(TableProfiler& self, const Ids<Index>& ids) {
  nb::gil_scoped_release unlocked;
  self.push(std::span<const Index>(ids.data(), ids.size()));
}

nb::dict counts(const TableProfiler& self) {
  const TableProfiler::Counts& c = self.counts();
  const TableProfiler::SampleCounts& s = self.sample_counts();
  nb::dict d;
  d["batches"] = c.batches;
  d["lookups"] = c.lookups;
  d["unique_rows"] = c.unique_rows;
  d["unique_rows_of_quarter"] = c.unique_rows_of_quarter;
  d["unique_rows_of_sixteenth"] = c.unique_rows_of_sixteenth;
  d["used_rows"] = c.used_rows;
  d["lookups_of_range"] = c.lookups_of_range;
  d["sampled_reuse"] = s.reuse;
  const auto groups = [&d](const char* name, const TableProfiler::Groups& g) {
    nb::dict of;
    of["batches"] = g.batches;
    of["complete"] = g.complete;
    of["unique_rows"] = g.unique_rows;
    of["fresh_rows"] = g.fresh_rows;
    d[name] = of;
  };
  groups("sampled_groups_of_1", s.of_1);
  groups("sampled_groups_of_4", s.of_4);
  groups("sampled_groups_of_16", s.of_16);
  groups("sampled_windows", s.windows);
  return d;
}

nb::list pools(const TableProfiler& self) {
  nb::list windows;
  for (const MissSimulator& simulator : self.simulators()) {
    std::vector<int64_t> misses, write_backs;
    std::vector<int32_t> resident;  // -1: given up, it could not hold a batch
    for (const MissSimulator::Pool& p : simulator.pools()) {
      misses.push_back(p.misses);
      write_backs.push_back(p.write_backs);
      resident.push_back(p.directory ? p.directory->resident() : -1);
    }
    nb::dict d;
    d["lookahead"] = simulator.lookahead();
    d["batches"] = simulator.looked_up();
    d["misses"] = misses;
    d["write_backs"] = write_backs;
    d["resident"] = resident;
    windows.append(d);
  }
  return windows;
}

}  // namespace

void bind_profiler(nb::module_& m) {
  nb::class_<TableProfiler>(m, "TableProfiler")
      .def(nb::init<int64_t, int64_t, uint64_t, const std::vector<int64_t>&, const std::vector<uint32_t>&, uint32_t, int64_t>(), "rows"_a,
           "sampled_rows"_a, "seed"_a, "pool_rows"_a, "lookaheads"_a, "outstanding"_a, "window_batches"_a)
      .def("push", &push<int64_t>, "ids"_a)
      .def("push", &push<int32_t>, "ids"_a)
      .def("finish", &TableProfiler::finish, nb::call_guard<nb::gil_scoped_release>())
      .def("counts", &counts)
      .def("pools", &pools)
      .def("lru_misses", &TableProfiler::lru_misses)
      .def("scaled_pools", &TableProfiler::scaled_pools)
      .def("uses_of_sample",
           [](const TableProfiler& self) {
             const auto uses = self.uses_of_sample();
             return nb::ndarray<nb::numpy, const uint32_t, nb::ndim<1>>(uses.data(), {uses.size()}, nb::find(self));
           })
      .def("check", [](const TableProfiler& self) {
        for (const MissSimulator& simulator : self.simulators()) simulator.check();
      });
}
