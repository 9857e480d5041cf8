#include "log_inspector.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "errors.h"
#include "index_snapshot.h"
#include "volume_folder.h"

namespace mtrains {
namespace {

constexpr uint64_t kReadBytes = 1u << 20;

// What became of an entry of the snapshot; places have their highest bit clear.
constexpr uint64_t kMet = ~uint64_t{0};         // its record is there, and the newest of its row so far
constexpr uint64_t kOld = kMet - 1;             // its record is there, and one that the snapshot covers is newer
constexpr uint64_t kLater = kMet - 2;           // a record behind the snapshot counts

}  // namespace

LogInspector::LogInspector(Manifest manifest) : manifest_(std::move(manifest)) {
  for (const ManifestTable& t : manifest_.tables) {
    sequences_.emplace_back(static_cast<size_t>(t.spec.row_count));
    segments_.emplace_back(static_cast<size_t>(t.spec.row_count));
  }
}

void LogInspector::read_snapshot(const std::string& file) {
  System& system = System::real();
  for (const ManifestTable& t : manifest_.tables) entries_.emplace_back(static_cast<size_t>(t.spec.row_count));
  for (const ManifestSegment& s : manifest_.segments) {
    in_snapshot_[s.number] = s.in_snapshot;
    unread_.insert(s.number);
  }
  const File opened(system, system.open(file.c_str(), O_RDONLY, 0));
  if (!opened.is_open()) throw_io("open", file, errno);
  read_index_snapshot(opened, file, manifest_.volume, manifest_.snapshot,
                      [&](uint32_t table, uint64_t first_row, std::span<const uint64_t> places) {
                        if (table > entries_.size() || first_row + places.size() > entries_[table - 1].size()) {
                          throw Error(ErrorKind::kDamagedRecord, "index " + file + " names rows that no table has");
                        }
                        std::copy(places.begin(), places.end(), entries_[table - 1].data() + first_row);
                      });
}

void LogInspector::settle(TableId table, const RecordHeader& header, uint64_t newest_before, Place place, bool covered) {
  if (entries_.empty()) return;
  uint64_t& entry = entries_[table - 1][static_cast<size_t>(header.row)];
  if (!covered) {
    entry = kLater;
  } else if (entry == place.pack()) {
    entry = header.sequence < newest_before ? kOld : kMet;
  } else if (entry == kMet && header.sequence > newest_before) {
    entry = kOld;
  }
}

void LogInspector::check_snapshot() {
  for (size_t t = 0; t < entries_.size(); ++t) {
    const std::string& table = manifest_.tables[t].spec.name;
    for (size_t row = 0; row < entries_[t].size(); ++row) {
      const uint64_t entry = entries_[t][row];
      if (entry == kMet || entry == kLater || (entry == 0 && sequences_[t][row] == 0)) continue;
      const Place place = entry == 0 || entry == kOld ? Place{0, 0, 0} : Place::unpack(entry);
      if (unread_.contains(place.segment)) continue;  // reported as a whole
      add(place.segment, place.block, place.position, table, static_cast<int64_t>(row),
          entry == 0      ? "the index snapshot says that the row was never put, the log has a record of it"
          : entry == kOld ? "the index snapshot points at an older record of the row"
                          : "the index snapshot points here, where no record of the row is");
    }
  }
}

void LogInspector::read(const ManifestSegment& segment, uint32_t first, uint32_t records, const std::string& file, bool verify) {
  System& system = System::real();
  const File opened(system, system.open(file.c_str(), O_RDONLY, 0));
  if (!opened.is_open()) throw_io("open", file, errno);
  std::vector<std::byte> buffer(std::max<uint64_t>(kReadBytes / segment.block_bytes, 1) * segment.block_bytes);
  SegmentHeader header;
  read_whole(opened, &header, sizeof header, 0, file);
  if (header.magic != kSegmentMagic || header.crc != crc32c(0, &header, offsetof(SegmentHeader, crc)) ||
      header.volume != manifest_.volume || header.segment != segment.number || header.block_bytes != segment.block_bytes) {
    throw Error(ErrorKind::kDamagedRecord, "segment " + file + " does not begin with the header of this volume's segment " +
                                               std::to_string(segment.number) + ". Restore the volume from a copy");
  }
  const uint64_t damage_before = damage_count_, records_before = records_[segment.number];
  const auto per_read = static_cast<uint32_t>(buffer.size() / segment.block_bytes);
  for (; first < segment.blocks; first += per_read) {
    const uint32_t count = std::min(per_read, segment.blocks - first);
    read_whole(opened, buffer.data(), uint64_t{count} * segment.block_bytes, kPageBytes + uint64_t{first} * segment.block_bytes, file);
    for (uint32_t b = 0; b < count; ++b) read_block(segment, first + b, buffer.data() + uint64_t{b} * segment.block_bytes, verify);
  }
  const uint64_t met = records_[segment.number] - records_before;
  if (met != records && damage_count_ == damage_before) {
    add(segment.number, 0, 0, "", -1, "the checkpoint counts " + std::to_string(records) + " records in the segment, there are " +
                                          std::to_string(met) + ": the end of a block was wiped");
  }
  unread_.erase(segment.number);
  posix_fadvise(opened.fd(), 0, 0, POSIX_FADV_DONTNEED);
}

void LogInspector::read_block(const ManifestSegment& segment, uint32_t block, const std::byte* data, bool verify) {
  const TableId number = header_of(data).table;
  if (number == 0 || number > manifest_.tables.size()) {
    return add(segment.number, block, 0, "", header_of(data).row, "no record of a known table begins the block (table " + std::to_string(number) + ")");
  }
  const auto in_snapshot = in_snapshot_.find(segment.number);
  const uint32_t covered = in_snapshot == in_snapshot_.end() ? 0 : in_snapshot->second;
  const TableSpec& spec = manifest_.tables[number - 1].spec;
  const BlockShape shape = BlockShape::of(spec.record_bytes);
  if (shape.block_bytes != segment.block_bytes) return add(segment.number, block, 0, spec.name, header_of(data).row, "the table has blocks of another size");
  uint32_t i = 0;
  for (; i < shape.records; ++i) {
    const std::byte* record = data + uint64_t{i} * shape.stride_bytes;
    const RecordHeader h = header_of(record);
    if (h.table == 0) break;
    ++records_[segment.number];
    if (h.table != number || h.row < 0 || h.row >= spec.row_count) {
      add(segment.number, block, i, spec.name, h.row, "the header names table " + std::to_string(h.table) + " and an impossible row");
      continue;
    }
    const Place place{segment.number, block, i};
    if (verify && h.crc != record_crc(record, spec.record_bytes, place.pack())) {
      add(segment.number, block, i, spec.name, h.row, "the record fails its checksum");
      settle(number, {0, number, h.row, 0}, 0, place, block < covered);  // it is there, however damaged
      continue;
    }
    uint64_t& newest = sequences_[number - 1][static_cast<size_t>(h.row)];
    settle(number, h, newest, place, block < covered);
    if (h.sequence < newest) continue;
    newest = h.sequence;
    segments_[number - 1][static_cast<size_t>(h.row)] = segment.number;
  }
  if (!verify) return;
  const std::byte* rest = data + uint64_t{i} * shape.stride_bytes;
  if (!is_zeros(rest, data + segment.block_bytes)) {
    add(segment.number, block, i, spec.name, -1, "bytes follow the last record of the block");
  }
}

void LogInspector::add(uint32_t segment, uint32_t block, uint32_t position, const std::string& table, int64_t row,
                       std::string what) {
  ++damage_count_;
  if (damage_.size() < kMostDamage) damage_.push_back({segment, block, position, table, row, std::move(what)});
}

std::map<uint32_t, uint64_t> LogInspector::newest_by_segment() const {
  std::map<uint32_t, uint64_t> count;
  for (const auto& [number, records] : records_) count[number] = 0;
  for (size_t t = 0; t < sequences_.size(); ++t) {
    for (size_t row = 0; row < segments_[t].size(); ++row) {
      if (const uint32_t number = segments_[t][row]) ++count[number];
    }
  }
  return count;
}

std::vector<uint64_t> LogInspector::live_rows() const {
  std::vector<uint64_t> rows;
  for (const auto& table : segments_) {
    uint64_t live = 0;
    for (size_t row = 0; row < table.size(); ++row) live += table[row] != 0;
    rows.push_back(live);
  }
  return rows;
}

}  // namespace mtrains
