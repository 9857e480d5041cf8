// A whole volume whose files were edited: it opens and serves, or throws the typed error; nothing else.
//
//   input  flags u8 | edit*
//   edit   file u8 | offset u16 | length u8 (1 to 8 are used) | bytes
//   flags  1 records, 2 manifests, 4 segment headers, 8 index snapshots: their checksums are put right after the edits
//          16 mapped  32 read-only  64 written to, checkpointed and restored after it was read
//
// The volume is made once: three tables with blocks of different shapes, two checkpoints, an index snapshot. Its files lie in
// memory (FUZZ_DIR, /dev/shm), its images in this process; every input writes them anew. Offsets count within what is written
// of a file: the rest of a segment is zeros that no checkpoint counts.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <thread>

#include "index_snapshot.h"
#include "log_volume.h"

namespace mtrains {
namespace {

constexpr int64_t kRows = 12, kMostRows = 4096;
constexpr uint32_t kRecordBytes[] = {8, 700, 5000};
constexpr uint64_t kMostBytes = 1u << 20;
using Bytes = std::vector<std::byte>;

enum Flags : uint8_t { kRecords = 1, kManifests = 2, kHeaders = 4, kSnapshots = 8, kMapped = 16, kReadOnly = 32, kWritten = 64 };

struct Image {
  std::string name;
  uint64_t file_bytes;
  Bytes written;
};

void fix_records(const std::string& name, Bytes& bytes) {
  SegmentHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  const auto segment = static_cast<uint32_t>(std::stoul(name.substr(8, 8), nullptr, 16));
  const BlockShape first = BlockShape::of(kRecordBytes[0]);
  const bool sane = header.block_bytes >= first.block_bytes && header.block_bytes % kPageBytes == 0;
  const uint64_t block_bytes = sane ? header.block_bytes : first.block_bytes;
  for (uint32_t block = 0; kPageBytes + (block + 1) * block_bytes <= bytes.size(); ++block) {
    std::byte* at = bytes.data() + kPageBytes + block * block_bytes;
    const TableId table = header_of(at).table;
    if (table == 0 || table > std::size(kRecordBytes)) continue;
    const BlockShape shape = BlockShape::of(kRecordBytes[table - 1]);
    for (uint32_t i = 0; i < block_bytes / shape.stride_bytes; ++i) {
      std::byte* record = at + uint64_t{i} * shape.stride_bytes;
      if (header_of(record).table == 0) break;
      const uint32_t crc = record_crc(record, shape.record_bytes, Place{segment, block, i}.pack());
      std::memcpy(record, &crc, 4);
    }
  }
}

void fix_header(Bytes& bytes) {
  const uint32_t crc = crc32c(0, bytes.data(), offsetof(SegmentHeader, crc));
  std::memcpy(bytes.data() + offsetof(SegmentHeader, crc), &crc, 4);
}

void fix_last(Bytes& bytes) {  // a manifest's
  const uint32_t crc = crc32c(0, bytes.data(), bytes.size() - 4);
  std::memcpy(bytes.data() + bytes.size() - 4, &crc, 4);
}

void fix_snapshot(Bytes& bytes) {
  constexpr size_t kHeader = 40;
  uint32_t crc = crc32c(0, bytes.data(), kHeader);
  std::memcpy(bytes.data() + kHeader, &crc, 4);
  for (size_t at = kHeader + 4; at + 20 <= bytes.size();) {
    uint32_t entries;
    std::memcpy(&entries, bytes.data() + at + 4, 4);
    const size_t page = 16 + size_t{8} * entries;
    if (at + page + 4 > bytes.size()) break;
    crc = crc32c(0, bytes.data() + at, page);
    std::memcpy(bytes.data() + at + page, &crc, 4);
    at += page + 4;
  }
}

class Fuzz {
 public:
  Fuzz() {
    const char* base = std::getenv("FUZZ_DIR");
    folder_ = std::string(base ? base : "/dev/shm") + "/mtrains_fuzz_XXXXXX";
    if (!mkdtemp(folder_.data())) std::abort();
    build();
  }
  ~Fuzz() { std::filesystem::remove_all(folder_); }

  void run(const uint8_t* data, size_t size) {
    if (size < 1) return;
    std::vector<Image> images = images_;
    const uint8_t flags = data[0];
    edit(images, data + 1, size - 1);
    for (Image& image : images) {
      const bool segment = image.name.ends_with(".log"), manifest = image.name.starts_with("manifest_");
      if (segment && (flags & kRecords)) fix_records(image.name, image.written);
      if (segment && (flags & kHeaders)) fix_header(image.written);
      if (manifest && (flags & kManifests)) fix_last(image.written);
      if (!segment && !manifest && (flags & kSnapshots)) fix_snapshot(image.written);
      if (manifest && !is_small(image.written)) return;
    }
    write(images);
    try {
      use(flags);
    } catch (const Error&) {
    }
  }

 private:
  LogOptions options(uint8_t flags) const {
    LogOptions options;
    options.paths = {folder_};
    options.capacity_bytes = 16u << 20;
    options.backend = "pread";
    options.depth = 1;
    options.snapshot_after_bytes = 0;
    options.mapped = flags & kMapped;
    options.read_only = flags & kReadOnly;
    return options;
  }

  void put(LogVolume& volume, TableId table, int64_t first, int64_t step) {
    const uint32_t bytes = volume.tables()[table].spec.record_bytes;
    std::vector<int64_t> rows;
    std::vector<int32_t> slots;
    for (int64_t r = first; r < kRows; r += step) {
      slots.push_back(static_cast<int32_t>(rows.size()));
      rows.push_back(r);
    }
    Bytes records(rows.size() * bytes, static_cast<std::byte>(first + step));
    const Part part{records.data(), bytes, bytes};
    volume.put(table, rows, slots, {&part, 1});
  }

  void build() {
    {
      LogVolume volume(options(0));
      for (size_t t = 0; t < std::size(kRecordBytes); ++t) {
        volume.table({"table " + std::to_string(t), kRows, kRecordBytes[t]},
                     t == 0 ? Initializer{} : Initializer{false, t, -1.0f, 1.0f, 0, {{0, 4}}, WeightType::kFloat32});
      }
      uint64_t epoch = 0;
      for (const int64_t step : {1, 2, 5}) {  // the newest manifest names the snapshot of the first epochs, written meanwhile
        for (TableId t = 0; t < std::size(kRecordBytes); ++t) put(volume, t, 0, step);
        volume.checkpoint(++epoch);
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
      }
      volume.close();
    }
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      if (entry.path().extension() == ".lock") continue;
      Image image{entry.path().filename(), entry.file_size(), Bytes(entry.file_size())};
      const File file(System::real(), open(entry.path().c_str(), O_RDONLY));
      read_whole(file, image.written.data(), image.written.size(), 0, image.name);
      const auto last = std::find_if(image.written.rbegin(), image.written.rend(), [](std::byte b) { return b != std::byte{0}; });
      const auto used = static_cast<size_t>(image.written.rend() - last);
      if (image.name.ends_with(".log")) image.written.resize((used + kPageBytes - 1) / kPageBytes * kPageBytes);
      images_.push_back(std::move(image));
    }
    std::sort(images_.begin(), images_.end(), [](const Image& a, const Image& b) { return a.name < b.name; });
  }

  static void edit(std::vector<Image>& images, const uint8_t* data, size_t size) {
    while (size > 4) {
      Bytes& bytes = images[data[0] % images.size()].written;
      const size_t offset = data[1] | data[2] << 8, length = std::min<size_t>(1 + data[3] % 8, size - 4);
      for (size_t i = 0; i < length && offset + i < bytes.size(); ++i) bytes[offset + i] = static_cast<std::byte>(data[4 + i]);
      data += 4 + length;
      size -= 4 + length;
    }
  }

  // Tables of billions of rows are no damage, and opening them takes memory in proportion: left out.
  static bool is_small(const Bytes& manifest) {
    try {
      const Manifest m = Manifest::decode(manifest, "file");
      return std::all_of(m.tables.begin(), m.tables.end(), [](const ManifestTable& t) { return t.spec.row_count <= kMostRows; });
    } catch (const Error&) {
      return true;
    }
  }

  void write(const std::vector<Image>& images) const {
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) std::filesystem::remove(entry.path());
    for (const Image& image : images) {
      const File file(System::real(), open((folder_ + "/" + image.name).c_str(), O_RDWR | O_CREAT, 0600));
      write_whole(file, image.written.data(), image.written.size(), 0, image.name);
      if (ftruncate(file.fd(), static_cast<off_t>(image.file_bytes)) != 0) std::abort();
    }
  }

  void read_all(LogVolume& volume) const {
    const std::vector<TableInfo> tables = volume.tables();
    for (TableId t = 0; t < tables.size(); ++t) {
      const TableSpec& spec = tables[t].spec;
      const auto count = std::min<int64_t>(spec.row_count, static_cast<int64_t>(kMostBytes / spec.record_bytes));
      std::vector<int64_t> rows(static_cast<size_t>(count));
      std::iota(rows.begin(), rows.end(), int64_t{0});
      Bytes out(rows.size() * spec.record_bytes);
      std::vector<GetRequest> requests;
      requests.push_back({t, rows, {rows.begin(), rows.end()}, {{out.data(), spec.record_bytes, spec.record_bytes}}});
      try {
        volume.wait(volume.submit_get(std::move(requests)));
      } catch (const Error&) {  // the other tables are read all the same
      }
    }
  }

  void use(uint8_t flags) {
    LogVolume volume(options(flags));
    read_all(volume);
    if ((flags & kReadOnly) || !(flags & kWritten)) return;
    const std::vector<uint64_t> epochs = volume.epochs();
    for (TableId t = 0; t < volume.tables().size(); ++t) {
      if (volume.tables()[t].spec.row_count >= kRows) put(volume, t, 1, 7);
    }
    if (epochs.back() < UINT64_MAX) volume.checkpoint(epochs.back() + 1);
    read_all(volume);
    volume.restore(volume.epochs().front());
    read_all(volume);
    volume.close();
  }

  std::string folder_;
  std::vector<Image> images_;
};

}  // namespace
}  // namespace mtrains

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static mtrains::Fuzz fuzz;
  fuzz.run(data, size);
  return 0;
}
