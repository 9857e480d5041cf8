// Bindings of the volumes. volumes.py gives them their public names and checks what users pass.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind_records.h"
#include "errors.h"
#include "memory_volume.h"
#include "faulty_system.h"
#include "log_volume.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

namespace {

void get_records(Volume& volume, TableId table, const Ids& ids, const Records& out) {
  GetRequest request{table, {ids.data(), ids.data() + ids.size()}, counted(ids.size()), as_parts(out)};
  std::vector<GetRequest> requests;
  requests.push_back(std::move(request));
  nb::gil_scoped_release unlocked;
  volume.wait(volume.submit_get(std::move(requests)));
}

// `out` and `wanted` are the caller's to keep until wait.
uint64_t submit_get(Volume& volume, TableId table, const Ids& ids, const Records& out, const RowSet* wanted, bool take) {
  std::vector<GetRequest> requests;
  requests.push_back({table, {ids.data(), ids.data() + ids.size()}, counted(ids.size()), as_parts(out), take, wanted});
  nb::gil_scoped_release unlocked;
  return volume.submit_get(std::move(requests));
}

// The neighbours: their rows, and their payloads as bytes.
nb::tuple wait_for(Volume& volume, uint64_t token) {
  Neighbours found;
  {
    nb::gil_scoped_release unlocked;
    found = volume.wait(token);
  }
  nb::list rows, payloads;
  for (const Neighbour& n : found.rows) {
    rows.append(n.row);
    payloads.append(nb::bytes(found.payloads.data() + n.at, n.bytes));
  }
  return nb::make_tuple(rows, payloads);
}

void put_records(Volume& volume, TableId table, const Ids& ids, const Records& records) {
  const std::vector<int32_t> slots = counted(ids.size());
  const std::vector<Part> parts = as_parts(records);
  const std::span<const int64_t> rows(ids.data(), ids.size());
  nb::gil_scoped_release unlocked;
  volume.put(table, rows, slots, parts);
}

int64_t in_set(const RowSet& set, int64_t row) {
  if (row >= 0 && row < set.rows()) return row;
  throw Error(ErrorKind::kIdOutOfRange, "row " + std::to_string(row) + " is outside [0, " + std::to_string(set.rows()) + "), the rows of this set");
}

nb::dict stats_of(const Volume& volume) {
  const VolumeStats s = volume.stats();
  nb::dict d;
  d["get_rows"] = s.get_rows;
  d["get_rows_initial"] = s.get_rows_initial;
  d["get_rows_buffered"] = s.get_rows_buffered;
  d["get_rows_mapped"] = s.get_rows_mapped;
  d["put_rows"] = s.put_rows;
  d["read_ios"] = s.read_ios;
  d["read_bytes"] = s.read_bytes;
  d["neighbour_rows"] = s.neighbour_rows;
  d["write_ios"] = s.write_ios;
  d["write_bytes"] = s.write_bytes;
  d["disk_bytes"] = s.disk_bytes;
  d["checkpoints"] = s.checkpoints;
  d["cleaned_segments"] = s.cleaned_segments;
  d["moved_rows"] = s.moved_rows;
  d["clean_read_ios"] = s.clean_read_ios;
  d["clean_read_bytes"] = s.clean_read_bytes;
  d["read_wait_seconds"] = s.read_wait_seconds;
  d["io_busy_seconds"] = s.io_busy_seconds;
  d["io_flight_seconds"] = s.io_flight_seconds;
  d["registered_buffer_bytes"] = s.registered_buffer_bytes;
  return d;
}

}  // namespace

void bind_volumes(nb::module_& m) {
  nb::enum_<WeightType>(m, "WeightType").value("float32", WeightType::kFloat32).value("float16", WeightType::kFloat16);

  nb::class_<ColumnRange>(m, "ColumnRange").def(nb::init<int64_t, uint32_t>(), "first"_a, "count"_a);

  nb::class_<Initializer>(m, "Initializer")
      .def(nb::init<>())
      .def_rw("zero", &Initializer::zero)
      .def_rw("seed", &Initializer::seed)
      .def_rw("low", &Initializer::low)
      .def_rw("high", &Initializer::high)
      .def_rw("first_row", &Initializer::first_row)
      .def_rw("columns", &Initializer::columns)
      .def_rw("type", &Initializer::type);

  nb::class_<RowSet>(m, "RowSet")
      .def(nb::init<int64_t>(), "rows"_a)
      .def("add",
           [](RowSet& self, const Ids& ids) {
             for (size_t i = 0; i < ids.size(); ++i) self.add(in_set(self, ids.data()[i]));
           },
           "ids"_a)
      .def("remove",
           [](RowSet& self, const Ids& ids) {
             for (size_t i = 0; i < ids.size(); ++i) self.remove(in_set(self, ids.data()[i]));
           },
           "ids"_a)
      .def("__contains__", &RowSet::contains, "row"_a);

  nb::class_<Volume>(m, "Volume")
      .def("table",
           [](Volume& self, std::string name, int64_t row_count, uint32_t record_bytes, const Initializer& init) {
             return self.table({std::move(name), row_count, record_bytes}, init);
           },
           "name"_a, "row_count"_a, "record_bytes"_a, "init"_a)
      .def("get", &get_records, "table"_a, "ids"_a, "out"_a)
      .def("put", &put_records, "table"_a, "ids"_a, "records"_a)
      .def("submit_get", &submit_get, "table"_a, "ids"_a, "out"_a, "wanted"_a.none() = nb::none(), "take"_a = false)
      .def("wait", &wait_for, "token"_a)
      .def("flush", &Volume::flush, nb::call_guard<nb::gil_scoped_release>())
      .def("checkpoint", &Volume::checkpoint, "epoch"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("restore", &Volume::restore, "epoch"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("epochs", &Volume::epochs)
      .def("stats", &stats_of)
      .def("backend", [](const Volume& self) { return std::string(self.backend()); })
      .def("id", &Volume::id)
      .def("close", &Volume::close, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<MemoryVolume, Volume>(m, "MemoryVolume").def(nb::init<>());

  nb::enum_<Fault>(m, "Fault")
      .value("short_read", Fault::kShortRead)
      .value("torn_write", Fault::kTornWrite)
      .value("lost_write", Fault::kLostWrite)
      .value("misdirected_write", Fault::kMisdirectedWrite)
      .value("bit_flip", Fault::kBitFlip)
      .value("read_error", Fault::kReadError)
      .value("write_error", Fault::kWriteError)
      .value("no_space", Fault::kNoSpace)
      .value("open_error", Fault::kOpenError)
      .value("map_error", Fault::kMapError)
      .value("sync_error", Fault::kSyncError)
      .value("delay", Fault::kDelay);

  nb::class_<FaultySystem>(m, "FaultySystem")
      .def(nb::init<uint64_t>(), "seed"_a)
      .def("arm", &FaultySystem::arm, "fault"_a, "countdown"_a)
      .def("struck", &FaultySystem::struck)
      .def("power_loss", &FaultySystem::power_loss, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<LogVolume, Volume>(m, "LogVolume")
      .def("__init__",
           [](LogVolume* self, std::vector<std::string> paths, uint64_t capacity_bytes, uint32_t keep_checkpoints,
              std::string backend, uint32_t depth, bool mapped, bool read_only, std::optional<uint64_t> epoch,
              uint64_t snapshot_after_bytes, std::shared_ptr<FaultySystem> system) {
             nb::gil_scoped_release unlocked;
             new (self) LogVolume({std::move(paths), capacity_bytes, keep_checkpoints, std::move(backend), depth, mapped, read_only,
                                   epoch, snapshot_after_bytes, std::move(system)});
           },
           "paths"_a, "capacity_bytes"_a, "keep_checkpoints"_a, "backend"_a, "depth"_a, "mapped"_a, "read_only"_a,
           "epoch"_a.none(), "snapshot_after_bytes"_a, "system"_a.none())
      .def("await_restore", &LogVolume::await_restore)
      .def("withdraw", &LogVolume::withdraw, "epoch"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("grow", &LogVolume::grow, "table"_a, "row_count"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("tables",
           [](const LogVolume& self) {
             nb::list result;
             for (const TableInfo& t : self.tables()) {
               result.append(nb::make_tuple(t.spec.name, t.spec.row_count, t.spec.record_bytes, t.live_rows));
             }
             return result;
           })
      .def("segments",
           [](const LogVolume& self) {
             nb::list result;
             for (const SegmentInfo& s : self.segments()) {
               result.append(nb::make_tuple(s.number, s.path_index, s.block_bytes, s.blocks, s.kept, s.live_bytes, s.bytes));
             }
             return result;
           })
      .def("fallback_reason", &LogVolume::fallback_reason)
      .def("unregistered_reason", &LogVolume::unregistered_reason)
      .def("direct", &LogVolume::direct)
      .def("wants_checkpoint", &LogVolume::wants_checkpoint);
}
