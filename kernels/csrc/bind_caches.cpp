// Bindings of the caches in front of a volume. caches.py gives them their public names.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind_records.h"
#include "cached_volume.h"
#include "faulty_system.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

namespace {

nb::dict as_dict(const CacheStats& s) {
  nb::dict d;
  d["rows"] = s.rows;
  d["resident_rows"] = s.resident_rows;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  d["inserted_rows"] = s.inserted_rows;
  d["evictions"] = s.evictions;
  d["write_backs"] = s.write_backs;
  d["flushed_rows"] = s.flushed_rows;
  d["read_bytes"] = s.read_bytes;
  d["written_bytes"] = s.written_bytes;
  return d;
}

}  // namespace

void bind_caches(nb::module_& m) {
  nb::class_<CacheSpec>(m, "CacheSpec")
      .def("__init__",
           [](CacheSpec* self, int64_t rows, std::string folder, std::shared_ptr<FaultySystem> system) {
             new (self) CacheSpec{rows, std::move(folder), std::move(system)};
           },
           "rows"_a, "folder"_a, "system"_a.none());

  nb::class_<CachedVolume, Volume>(m, "CachedVolume")
      .def("__init__",
           [](CachedVolume* self, Volume* below, uint32_t batch_limit) { new (self) CachedVolume(*below, batch_limit); },
           "below"_a, "batch_limit"_a, nb::keep_alive<1, 2>())
      .def("cached_table",
           [](CachedVolume& self, std::string name, int64_t row_count, uint32_t record_bytes, const Initializer& init,
              const std::vector<CacheSpec>& caches) {
             nb::gil_scoped_release unlocked;
             return self.table({std::move(name), row_count, record_bytes}, init, caches);
           },
           "name"_a, "row_count"_a, "record_bytes"_a, "init"_a, "caches"_a)
      .def("evict",
           [](CachedVolume& self, TableId table, const Ids& ids, const Records& records, bool dirty) {
             const std::vector<int32_t> slots = counted(ids.size());
             const std::vector<Part> parts = as_parts(records);
             const std::span<const int64_t> rows(ids.data(), ids.size());
             nb::gil_scoped_release unlocked;
             self.evict(table, rows, slots, parts, dirty);
           },
           "table"_a, "ids"_a, "records"_a, "dirty"_a)
      .def("forget", &CachedVolume::forget, nb::call_guard<nb::gil_scoped_release>())
      .def("cache_stats",
           [](const CachedVolume& self, TableId table) {
             nb::list result;
             for (const CacheStats& s : self.cache_stats(table)) result.append(as_dict(s));
             return result;
           },
           "table"_a)
      .def("check", &CachedVolume::check);
}
