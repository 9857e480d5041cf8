// Bindings of whole batches of requests, for pools that are not in host memory: what SlotPool does with a volume in C++.
// Addresses of parts are torch data_ptr()s; the caller (device_pool.py) keeps them, and their slots untouched, until the wait.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include "volume.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

namespace {

using Rows = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Slots = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The native side trusts what describes a request: a wrong length here would read beyond its arrays.
template <class A, class B>
void require_same_length(const A& rows, const B& slots) {
  if (rows.size() != slots.size()) throw nb::value_error("a request has as many slots as rows");
}

}  // namespace

void bind_requests(nb::module_& m) {
  nb::class_<GetRequest>(m, "GetRequest")
      .def("__init__",
           [](GetRequest* self, TableId table, const Rows& rows, const Slots& slots, std::vector<Part> parts, bool take) {
             require_same_length(rows, slots);
             new (self) GetRequest{table, {rows.data(), rows.data() + rows.size()}, {slots.data(), slots.data() + slots.size()},
                                   std::move(parts), take};
           },
           "table"_a, "rows"_a, "slots"_a, "parts"_a, "take"_a);

  m.def("submit_gets",
        [](Volume& volume, std::vector<GetRequest> requests) {
          nb::gil_scoped_release unlocked;
          return volume.submit_get(std::move(requests));
        },
        "volume"_a, "requests"_a);
  m.def("put_rows",
        [](Volume& volume, TableId table, const Rows& rows, const Slots& slots, const std::vector<Part>& parts) {
          require_same_length(rows, slots);
          nb::gil_scoped_release unlocked;
          volume.put(table, {rows.data(), rows.size()}, {slots.data(), slots.size()}, parts);
        },
        "volume"_a, "table"_a, "rows"_a, "slots"_a, "parts"_a);
  m.def("evict_rows",
        [](Volume& volume, TableId table, const Rows& rows, const Slots& slots, const std::vector<Part>& parts, bool dirty) {
          require_same_length(rows, slots);
          nb::gil_scoped_release unlocked;
          volume.evict(table, {rows.data(), rows.size()}, {slots.data(), slots.size()}, parts, dirty);
        },
        "volume"_a, "table"_a, "rows"_a, "slots"_a, "parts"_a, "dirty"_a);
}
