// Bindings of the slot pool. Addresses are torch data_ptr()s: the caller (tiered_tbe.py) has checked type and layout.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "huge_pages.h"
#include "slot_pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

namespace {

using Rows = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Part make_part(uintptr_t address, uint64_t stride_bytes, uint32_t bytes) {
  return {reinterpret_cast<std::byte*>(address), stride_bytes, bytes};
}

nb::dict stats_of(const SlotPool& pool, size_t table) {
  const SlotPoolStats s = pool.stats(table);
  nb::dict d;
  d["batches"] = s.batches;
  d["lookups"] = s.lookups;
  d["unique_rows"] = s.unique_rows;
  d["misses"] = s.misses;
  d["refetched_rows"] = s.refetched_rows;
  d["admitted_rows"] = s.admitted_rows;
  d["evictions"] = s.evictions;
  d["write_backs"] = s.write_backs;
  d["flushed_rows"] = s.flushed_rows;
  d["trickled_rows"] = s.trickled_rows;
  d["resident_rows"] = pool.resident(table);
  return d;
}

}  // namespace

void bind_slots(nb::module_& m) {
  m.def("move_to_huge_pages", [](uintptr_t zeros, size_t bytes) { move_to_huge_pages(reinterpret_cast<void*>(zeros), bytes); },
        "zeros"_a, "bytes"_a);
  nb::class_<Part>(m, "Part").def("__init__", [](Part* self, uintptr_t address, uint64_t stride_bytes, uint32_t bytes) {
    new (self) Part(make_part(address, stride_bytes, bytes));
  });

  nb::class_<SlotPoolTable>(m, "SlotPoolTable")
      .def("__init__",
           [](SlotPoolTable* self, std::string name, Volume* volume, TableId id, int64_t rows, int32_t pool_rows,
              std::vector<Part> parts) {
             new (self) SlotPoolTable{std::move(name), volume, id, rows, pool_rows, std::move(parts)};
           },
           nb::keep_alive<1, 3>());

  nb::class_<Batch>(m, "Batch").def(
      "__init__",
      [](Batch* self, uintptr_t ids, bool ids_are_int32, int64_t id_count, uintptr_t offsets, bool offsets_are_int32, int64_t stride) {
        new (self) Batch{reinterpret_cast<const void*>(ids), ids_are_int32, reinterpret_cast<const void*>(offsets),
                         offsets_are_int32, stride, id_count};
      },
      "ids"_a, "ids_are_int32"_a, "id_count"_a, "offsets"_a, "offsets_are_int32"_a = false, "stride"_a = 1);

  nb::class_<SlotPool>(m, "SlotPool")
      .def(nb::init<std::vector<SlotPoolTable>, std::vector<int32_t>, uint32_t>(), "tables"_a, "table_of_feature"_a,
           "batch_limit"_a, nb::keep_alive<1, 2>())
      .def("announce",
           [](SlotPool& self, const Batch& batch) {
             nb::gil_scoped_release unlocked;
             return self.announce(batch);
           },
           "batch"_a)
      .def("withdraw", &SlotPool::withdraw, "announced"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("prefetch",
           [](SlotPool& self, const Batch& batch, uintptr_t slots, bool dirty, uint64_t announced, uint64_t lost) {
             nb::gil_scoped_release unlocked;
             return self.prefetch(batch, reinterpret_cast<int64_t*>(slots), dirty, announced, lost);
           },
           "batch"_a, "slots"_a, "dirty"_a, "announced"_a = 0, "lost"_a = 0)
      .def("begin",
           [](SlotPool& self, const Batch& batch, uintptr_t slots, bool dirty, uint64_t announced, uint64_t lost) {
             nb::gil_scoped_release unlocked;
             return self.begin(batch, reinterpret_cast<int64_t*>(slots), dirty, announced, lost);
           },
           "batch"_a, "slots"_a, "dirty"_a, "announced"_a = 0, "lost"_a = 0)
      .def("acquire", &SlotPool::acquire, "seq"_a, "dirty"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("wait", &SlotPool::wait, "seq"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("release", &SlotPool::release, "seq"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("alive", &SlotPool::alive, "seq"_a)
      .def("flush", &SlotPool::flush, nb::call_guard<nb::gil_scoped_release>())
      .def("trickle", &SlotPool::trickle, "table"_a, "min_age"_a, "looks"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("resident_rows",
           [](const SlotPool& self, size_t table) {
             auto* rows = new std::vector<int64_t>(self.resident_rows(table));
             const nb::capsule owner(rows, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
             return nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>(rows->data(), {rows->size()}, owner);
           },
           "table"_a)
      .def("warm",
           [](SlotPool& self, size_t table, const Rows& rows) {
             nb::gil_scoped_release unlocked;
             return self.warm(table, {rows.data(), rows.size()});
           },
           "table"_a, "rows"_a)
      .def("forget", &SlotPool::forget, nb::call_guard<nb::gil_scoped_release>())
      .def("read", &SlotPool::read, "table"_a, "first_row"_a, "count"_a, "to"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("write", &SlotPool::write, "table"_a, "first_row"_a, "count"_a, "source"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def("stats", &stats_of, "table"_a)
      .def("slot_of_row", &SlotPool::slot_of_row, "table"_a, "row"_a)
      .def_prop_ro("full", &SlotPool::full)
      .def_prop_ro("announced", &SlotPool::announced)
      .def_prop_ro("revoked", &SlotPool::revoked)
      .def_prop_ro("declined", &SlotPool::declined)
      .def_prop_ro("outstanding", &SlotPool::outstanding)
      .def("check", &SlotPool::check);
}
