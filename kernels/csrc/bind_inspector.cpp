// Bindings for those who look at a volume's files from outside: inspect.py, and the transfer of checkpoints.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "log_inspector.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mtrains;

namespace {

std::string hexadecimal(const VolumeId& id) {
  std::string text;
  for (const uint8_t byte : id) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

Manifest decode(const nb::bytes& data, const std::string& file) {
  const auto* begin = static_cast<const std::byte*>(data.data());
  return Manifest::decode({begin, begin + data.size()}, file);
}

nb::dict as_dict(const Manifest& m) {
  nb::list tables, segments;
  for (const ManifestTable& t : m.tables) {
    nb::dict d;
    d["name"] = t.spec.name;
    d["row_count"] = t.spec.row_count;
    d["record_bytes"] = t.spec.record_bytes;
    tables.append(d);
  }
  for (const ManifestSegment& s : m.segments) {
    nb::dict d;
    d["number"] = s.number;
    d["path_index"] = s.path_index;
    d["block_bytes"] = s.block_bytes;
    d["blocks"] = s.blocks;
    d["records"] = s.records;
    d["bytes"] = kPageBytes + uint64_t{s.blocks} * s.block_bytes;
    segments.append(d);
  }
  nb::dict d;
  d["volume"] = hexadecimal(m.volume);
  d["epoch"] = m.epoch;
  d["segment_bytes"] = m.segment_bytes;
  d["snapshot"] = m.snapshot;
  d["path_count"] = m.path_count;
  d["tables"] = tables;
  d["segments"] = segments;
  return d;
}

}  // namespace

void bind_inspector(nb::module_& m) {
  m.def("decode_manifest", [](const nb::bytes& data, const std::string& file) { return as_dict(decode(data, file)); }, "data"_a, "file"_a);

  nb::class_<LogInspector>(m, "LogInspector")
      .def("__init__",
           [](LogInspector* self, const nb::bytes& manifest, const std::string& file) { new (self) LogInspector(decode(manifest, file)); },
           "manifest"_a, "file"_a)
      .def("read",
           [](LogInspector& self, uint32_t number, uint32_t block_bytes, uint32_t first, uint32_t blocks, uint32_t records,
              const std::string& file, bool verify) {
             nb::gil_scoped_release unlocked;
             self.read({number, 0, block_bytes, blocks, records, 0, 0}, first, records, file, verify);
           },
           "number"_a, "block_bytes"_a, "first"_a, "blocks"_a, "records"_a, "file"_a, "verify"_a)
      .def("read_snapshot", &LogInspector::read_snapshot, "file"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("check_snapshot", &LogInspector::check_snapshot, nb::call_guard<nb::gil_scoped_release>())
      .def("records", &LogInspector::records, "segment"_a)
      .def_prop_ro("damage_count", &LogInspector::damage_count)
      .def_prop_ro("damage",
                   [](const LogInspector& self) {
                     nb::list list;
                     for (const Damage& d : self.damage()) list.append(nb::make_tuple(d.segment, d.block, d.position, d.table, d.row, d.what));
                     return list;
                   })
      .def("newest_by_segment",
           [](const LogInspector& self) {
             nb::dict d;
             for (const auto& [number, count] : self.newest_by_segment()) d[nb::int_(number)] = count;
             return d;
           })
      .def("live_rows", [](const LogInspector& self) {
        nb::list list;
        for (const uint64_t rows : self.live_rows()) list.append(rows);
        return list;
      });
}
