#include "index_snapshot.h"

#include <cstring>

#include "errors.h"

namespace mtrains {
namespace {

constexpr std::array<char, 8> kMagic = {'M', 'T', 'R', 'I', 'D', 'X', '\r', '\n'};
constexpr size_t kWriteBytes = 1u << 20;
constexpr uint32_t kMostEntries = 1u << 20;

struct Header {
  std::array<char, 8> magic;
  uint32_t version;
  VolumeId volume;
  uint32_t unused;
  uint64_t epoch;
};

struct PageHeader {
  uint32_t table, entries;
  uint64_t first_row;
};

}  // namespace

IndexSnapshotWriter::IndexSnapshotWriter(File file, std::string name, const VolumeId& volume, uint64_t epoch)
    : file_(std::move(file)), name_(std::move(name)) {
  const Header header{kMagic, kFormatVersion, volume, 0, epoch};
  const uint32_t crc = crc32c(0, &header, sizeof header);
  append(&header, sizeof header);
  append(&crc, sizeof crc);
}

void IndexSnapshotWriter::append(const void* data, size_t n) {
  const auto* p = static_cast<const std::byte*>(data);
  buffer_.insert(buffer_.end(), p, p + n);
  if (buffer_.size() >= kWriteBytes) write_out();
}

void IndexSnapshotWriter::write_out() {
  write_whole(file_, buffer_.data(), buffer_.size(), written_, name_);
  written_ += buffer_.size();
  buffer_.clear();
}

void IndexSnapshotWriter::page(uint32_t table, uint64_t first_row, std::span<const uint64_t> places) {
  const PageHeader header{table, static_cast<uint32_t>(places.size()), first_row};
  const uint32_t crc = crc32c(crc32c(0, &header, sizeof header), places.data(), places.size_bytes());
  append(&header, sizeof header);
  append(places.data(), places.size_bytes());
  append(&crc, sizeof crc);
}

uint64_t IndexSnapshotWriter::finish() {
  page(0, 0, {});
  write_out();
  sync_file(file_, name_);
  return written_;
}

void read_index_snapshot(const File& file, const std::string& name, const VolumeId& volume, uint64_t epoch, const SnapshotPage& page) {
  uint64_t at = 0;
  auto take = [&](void* to, uint64_t n) {
    read_whole(file, to, n, at, name);
    at += n;
  };
  auto fail = [&](const std::string& what) {
    throw Error(ErrorKind::kDamagedRecord, "index " + name + " is damaged (" + what + "). Restore the volume from a copy");
  };
  Header header;
  uint32_t crc;
  take(&header, sizeof header);
  take(&crc, sizeof crc);
  if (header.magic != kMagic || crc != crc32c(0, &header, sizeof header)) fail("it does not begin as one");
  if (header.version != kFormatVersion || header.volume != volume || header.epoch != epoch) fail("it belongs elsewhere");
  std::vector<uint64_t> places;
  for (;;) {
    PageHeader h;
    take(&h, sizeof h);
    if (h.entries > kMostEntries) fail("a page of " + std::to_string(h.entries) + " entries");
    places.resize(h.entries);
    take(places.data(), places.size() * 8);
    take(&crc, sizeof crc);
    if (crc != crc32c(crc32c(0, &h, sizeof h), places.data(), places.size() * 8)) fail("the page at byte " + std::to_string(at) + " fails its checksum");
    if (h.table == 0) return;
    page(h.table, h.first_row, places);
  }
}

}  // namespace mtrains
