#include "manifest.h"

#include <cstring>
#include <set>
#include <type_traits>

#include "errors.h"

namespace mtrains {
namespace {

constexpr std::array<char, 8> kMagic = {'M', 'T', 'R', 'M', 'A', 'N', '\r', '\n'};

class Writer {
 public:
  template <class T>
  void put(T value) {
    static_assert(std::is_arithmetic_v<T>);
    append(&value, sizeof value);
  }
  void append(const void* data, size_t n) {
    const auto* p = static_cast<const std::byte*>(data);
    bytes.insert(bytes.end(), p, p + n);
  }
  std::vector<std::byte> bytes;
};

// A block has at least one record, and at most as many as headers fit.
bool can_hold(uint64_t blocks, uint32_t block_bytes, uint64_t records) {
  return records >= blocks && records <= blocks * (block_bytes / kRecordHeaderBytes);
}

class Reader {
 public:
  Reader(const std::vector<std::byte>& bytes, size_t end, const std::string& file) : bytes_(bytes), end_(end), file_(file) {}
  template <class T>
  T get() {
    T value;
    copy(&value, sizeof value);
    return value;
  }
  void copy(void* to, size_t n) {
    require(n);
    std::memcpy(to, bytes_.data() + at_, n);
    at_ += n;
  }
  // A count of things of at least `least` bytes each: more than the file can hold is damage, not a reason to allocate.
  uint32_t count(size_t least) {
    const auto n = get<uint32_t>();
    require(size_t{n} * least);
    return n;
  }
  bool at_end() const { return at_ == end_; }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::kDamagedRecord, "manifest " + file_ + " is damaged (" + what + "). Restore the volume from a copy, "
                                               "or remove this file to open at the checkpoint before");
  }

 private:
  void require(size_t n) const {
    if (n > end_ - at_) fail("it ends early");
  }
  const std::vector<std::byte>& bytes_;
  size_t at_ = 0, end_;
  const std::string& file_;
};

}  // namespace

std::vector<std::byte> Manifest::encode() const {
  Writer w;
  w.append(kMagic.data(), kMagic.size());
  w.put(kFormatVersion);
  w.append(volume.data(), volume.size());
  w.put(epoch);
  w.put(next_sequence);
  w.put(segment_bytes);
  w.put(snapshot);
  w.put(path_count);
  w.put(static_cast<uint32_t>(tables.size()));
  for (const ManifestTable& t : tables) {
    w.put(static_cast<uint32_t>(t.spec.name.size()));
    w.append(t.spec.name.data(), t.spec.name.size());
    w.put(t.spec.row_count);
    w.put(t.spec.record_bytes);
    w.put(static_cast<uint8_t>(t.init.zero));
    w.put(static_cast<uint8_t>(t.init.type));
    w.put(t.init.seed);
    w.put(t.init.low);
    w.put(t.init.high);
    w.put(t.init.first_row);
    w.put(static_cast<uint32_t>(t.init.columns.size()));
    for (const ColumnRange& c : t.init.columns) {
      w.put(c.first);
      w.put(c.count);
    }
  }
  w.put(static_cast<uint32_t>(segments.size()));
  for (const ManifestSegment& s : segments) {
    w.put(s.number);
    w.put(s.path_index);
    w.put(s.block_bytes);
    w.put(s.blocks);
    w.put(s.records);
    w.put(s.in_snapshot);
    w.put(s.records_in_snapshot);
  }
  w.put(crc32c(0, w.bytes.data(), w.bytes.size()));
  return std::move(w.bytes);
}

Manifest Manifest::decode(const std::vector<std::byte>& bytes, const std::string& file) {
  const size_t end = bytes.size() < 4 ? 0 : bytes.size() - 4;
  Reader r(bytes, end, file);
  std::array<char, 8> magic;
  r.copy(magic.data(), magic.size());
  if (magic != kMagic) r.fail("it does not begin as one");
  const auto version = r.get<uint32_t>();
  if (version != kFormatVersion) {
    throw Error(ErrorKind::kVolumeMismatch, "manifest " + file + " has format version " + std::to_string(version) +
                                                ", this release reads " + std::to_string(kFormatVersion) +
                                                "; use the release that wrote it");
  }
  uint32_t crc;
  std::memcpy(&crc, bytes.data() + end, 4);
  if (crc != crc32c(0, bytes.data(), end)) r.fail("its checksum is wrong");
  Manifest m;
  r.copy(m.volume.data(), m.volume.size());
  m.epoch = r.get<uint64_t>();
  m.next_sequence = r.get<uint64_t>();
  m.segment_bytes = r.get<uint64_t>();
  m.snapshot = r.get<uint64_t>();
  m.path_count = r.get<uint32_t>();
  if (m.path_count == 0 || m.segment_bytes < kLeastSegmentBytes || m.segment_bytes > kMostSegmentBytes) {
    r.fail("segments of " + std::to_string(m.segment_bytes) + " bytes over " + std::to_string(m.path_count) + " paths");
  }
  m.tables.resize(r.count(46));
  std::set<std::string> names;
  std::set<uint32_t> block_sizes;
  for (ManifestTable& t : m.tables) {
    t.spec.name.resize(r.count(1));
    r.copy(t.spec.name.data(), t.spec.name.size());
    t.spec.row_count = r.get<int64_t>();
    t.spec.record_bytes = r.get<uint32_t>();
    t.init.zero = r.get<uint8_t>() != 0;
    t.init.type = static_cast<WeightType>(r.get<uint8_t>());
    t.init.seed = r.get<uint64_t>();
    t.init.low = r.get<float>();
    t.init.high = r.get<float>();
    t.init.first_row = r.get<int64_t>();
    t.init.columns.resize(r.count(12));
    for (ColumnRange& c : t.init.columns) {
      c.first = r.get<int64_t>();
      c.count = r.get<uint32_t>();
    }
    if (!is_valid(t.spec) || t.init.type > WeightType::kFloat16 ||
        (!t.init.zero && t.init.weight_bytes() > t.spec.record_bytes) ||
        !names.insert(t.spec.name).second) {
      r.fail("table '" + t.spec.name + "' cannot be");
    }
    block_sizes.insert(BlockShape::of(t.spec.record_bytes).block_bytes);
  }
  m.segments.resize(r.count(kManifestSegmentBytes));
  uint32_t before = 0;  // they ascend
  for (ManifestSegment& s : m.segments) {
    s.number = r.get<uint32_t>();
    s.path_index = r.get<uint32_t>();
    s.block_bytes = r.get<uint32_t>();
    s.blocks = r.get<uint32_t>();
    s.records = r.get<uint32_t>();
    s.in_snapshot = r.get<uint32_t>();
    s.records_in_snapshot = r.get<uint32_t>();
    if (s.number <= before || s.number >= kMostSegments || s.path_index >= m.path_count || s.in_snapshot > s.blocks ||
        s.records_in_snapshot > s.records || !block_sizes.contains(s.block_bytes) ||
        !can_hold(s.in_snapshot, s.block_bytes, s.records_in_snapshot) ||
        !can_hold(s.blocks - s.in_snapshot, s.block_bytes, s.records - s.records_in_snapshot) ||
        kPageBytes + uint64_t{s.blocks} * s.block_bytes > m.segment_bytes) {
      r.fail("segment " + std::to_string(s.number) + " cannot be");
    }
    before = s.number;
  }
  if (!r.at_end()) r.fail("it goes on after its end");
  return m;
}

}  // namespace mtrains
