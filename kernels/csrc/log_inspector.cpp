#include "log_inspector.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "errors.h"
#include "volume_folder.h"

namespace mtrains {
namespace {

constexpr uint64_t kReadBytes = 1u << 20;

}  // namespace

LogInspector::LogInspector(Manifest manifest) : manifest_(std::move(manifest)) {
  for (const ManifestTable& t : manifest_.tables) {
    sequences_.emplace_back(static_cast<size_t>(t.spec.row_count));
    segments_.emplace_back(static_cast<size_t>(t.spec.row_count));
  }
}

void LogInspector::read(const ManifestSegment& segment, uint32_t first, const std::string& file, bool verify) {
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
  records_[segment.number] += 0;
  const auto per_read = static_cast<uint32_t>(buffer.size() / segment.block_bytes);
  for (; first < segment.blocks; first += per_read) {
    const uint32_t count = std::min(per_read, segment.blocks - first);
    read_whole(opened, buffer.data(), uint64_t{count} * segment.block_bytes, kPageBytes + uint64_t{first} * segment.block_bytes, file);
    for (uint32_t b = 0; b < count; ++b) read_block(segment, first + b, buffer.data() + uint64_t{b} * segment.block_bytes, verify);
  }
  posix_fadvise(opened.fd(), 0, 0, POSIX_FADV_DONTNEED);
}

void LogInspector::read_block(const ManifestSegment& segment, uint32_t block, const std::byte* data, bool verify) {
  const TableId number = header_of(data).table;
  if (number == 0 || number > manifest_.tables.size()) {
    return add(segment, block, 0, "", header_of(data).row, "no record of a known table begins the block (table " + std::to_string(number) + ")");
  }
  const TableSpec& spec = manifest_.tables[number - 1].spec;
  const BlockShape shape = BlockShape::of(spec.record_bytes);
  if (shape.block_bytes != segment.block_bytes) return add(segment, block, 0, spec.name, header_of(data).row, "the table has blocks of another size");
  uint32_t i = 0;
  for (; i < shape.records; ++i) {
    const std::byte* record = data + uint64_t{i} * shape.stride_bytes;
    const RecordHeader h = header_of(record);
    if (h.table == 0) break;
    ++records_[segment.number];
    if (h.table != number || h.row < 0 || h.row >= spec.row_count) {
      add(segment, block, i, spec.name, h.row, "the header names table " + std::to_string(h.table) + " and an impossible row");
      continue;
    }
    if (verify && h.crc != record_crc(record, spec.record_bytes, Place{segment.number, block, i}.pack())) {
      add(segment, block, i, spec.name, h.row, "the record fails its checksum");
      continue;
    }
    uint64_t& newest = sequences_[number - 1][static_cast<size_t>(h.row)];
    if (h.sequence < newest) continue;
    newest = h.sequence;
    segments_[number - 1][static_cast<size_t>(h.row)] = segment.number;
  }
  if (!verify) return;
  const std::byte* rest = data + uint64_t{i} * shape.stride_bytes;
  if (!is_zeros(rest, data + segment.block_bytes)) {
    add(segment, block, i, spec.name, -1, "bytes follow the last record of the block");
  }
}

void LogInspector::add(const ManifestSegment& segment, uint32_t block, uint32_t position, const std::string& table, int64_t row,
                       std::string what) {
  ++damage_count_;
  if (damage_.size() < kMostDamage) damage_.push_back({segment.number, block, position, table, row, std::move(what)});
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
