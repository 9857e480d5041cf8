// Files changed behind a volume's back: a typed error, or nothing of it is ever served.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>

#include "check.h"
#include "media.h"

namespace mtrains::test {
namespace {

constexpr uint32_t kBytes = 300;
constexpr int64_t kRows = 100;

// Even rows at version 1, then rows below 50 at version 2. Until a checkpoint names a snapshot of the index others follow, with
// row 99 at the number of checkpoints before.
struct Small {
  Folder folder;
  LogOptions options;
  uint64_t epoch = 0;
  std::vector<uint64_t> newest = std::vector<uint64_t>(kRows, 0);

  explicit Small(const std::string& medium, bool snapshot = true) : options(options_for(medium, {folder.path()}, 64u << 20)) {
    options.snapshot_after_bytes = snapshot ? 0 : UINT64_MAX;
    write();
    CHECK(read() == newest);  // and what no manifest names, such as a snapshot that was being written, is gone
  }
  void write() {
    const auto volume = open_volume(options);
    const TableId table = volume->table({"t", kRows, kBytes}, {});
    const auto put = [&](const std::vector<int64_t>& rows, uint64_t version) {
      put_versions(*volume, table, kBytes, rows, std::vector<uint64_t>(rows.size(), version));
      for (const int64_t r : rows) newest[r] = version;
      volume->checkpoint(++epoch);
    };
    std::vector<int64_t> even;
    for (int64_t r = 0; r < kRows; r += 2) even.push_back(r);
    put(even, 1);
    put(rows_up_to(50), 2);
    while (options.snapshot_after_bytes == 0 && manifest().snapshot == 0) {  // it is written in the background
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      put({99}, epoch);
    }
  }
  std::string manifest_file(uint64_t of) const {
    char name[40];
    std::snprintf(name, sizeof name, "/manifest_%016llx.bin", static_cast<unsigned long long>(of));
    return folder.path() + name;
  }
  std::string index_file() const {  // that the newest manifest names
    char name[40];
    std::snprintf(name, sizeof name, "/index_%016llx.bin", static_cast<unsigned long long>(manifest().snapshot));
    return folder.path() + name;
  }
  Manifest manifest() const {
    std::vector<std::byte> bytes(std::filesystem::file_size(manifest_file(epoch)));
    const File file(System::real(), open(manifest_file(epoch).c_str(), O_RDONLY));
    read_whole(file, bytes.data(), bytes.size(), 0, "manifest");
    return Manifest::decode(bytes, "manifest");
  }
  std::vector<std::string> files() const {  // the lock left out
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
      if (entry.path().extension() != ".lock") names.push_back(entry.path());
    }
    std::sort(names.begin(), names.end());
    return names;
  }
  std::vector<uint64_t> read() const {
    const auto volume = open_volume(options);
    return get_versions(*volume, volume->table({"t", kRows, kBytes}, {}), kBytes, rows_up_to(kRows));
  }
};

void flip(const std::string& file, uint64_t bit) {
  const File opened(System::real(), open(file.c_str(), O_RDWR));
  uint8_t byte;
  CHECK(pread(opened.fd(), &byte, 1, static_cast<off_t>(bit / 8)) == 1);
  byte ^= static_cast<uint8_t>(1 << (bit % 8));
  CHECK(pwrite(opened.fd(), &byte, 1, static_cast<off_t>(bit / 8)) == 1);
}

bool is_typed(ErrorKind kind) {
  return kind == ErrorKind::kDamagedRecord || kind == ErrorKind::kVolumeMismatch || kind == ErrorKind::kVolumeIo;
}

TEST_ON_EACH_MEDIUM("a flipped bit of a volume's files is a typed error when it is opened, or changes no row") {
  Random random = fresh_random();
  const Small small(medium);
  CHECK(small.read() == small.newest);
  uint32_t refused = 0;
  for (const std::string& file : small.files()) {
    // Most of a segment is room that no checkpoint counts: look where it is written.
    const uint64_t bits = 8 * std::min<uint64_t>(std::filesystem::file_size(file), kPageBytes + 60'000);
    for (uint32_t i = 0; i < 60 * rounds(); ++i) {
      const uint64_t bit = i < 8 * 64 && i % 2 ? below(random, std::min<uint64_t>(bits, 8 * 64)) : below(random, bits);
      flip(file, bit);
      try {
        CHECK(small.read() == small.newest);
      } catch (const Error& e) {
        CHECK(is_typed(e.kind()));
        ++refused;
      }
      flip(file, bit);
    }
  }
  CHECK(refused > 0);
  CHECK(small.read() == small.newest);
}

TEST_ON_EACH_MEDIUM("any flipped bit of a record in the log that is replayed is a typed error, and none ends its block") {
  const Small small(medium, false);
  const BlockShape shape = BlockShape::of(kBytes);
  for (const std::string& file : small.files()) {
    if (!file.ends_with(".log")) continue;
    for (uint64_t bit = 0; bit < 8 * (kRecordHeaderBytes + 4); ++bit) {
      const uint64_t at = 8 * (kPageBytes + shape.stride_bytes) + bit;  // of the second record
      flip(file, at);
      check_error(ErrorKind::kDamagedRecord, [&] { small.read(); });
      flip(file, at);
    }
  }
  CHECK(small.read() == small.newest);
}

TEST_ON_EACH_MEDIUM("a bit that flips under an open volume is a typed error that names the row, and the other rows read on") {
  const Small small(medium);
  const auto volume = open_volume(small.options);
  const TableId table = volume->table({"t", kRows, kBytes}, {});
  for (const std::string& file : small.files()) {
    if (!file.ends_with(".log")) continue;
    for (uint64_t byte = kPageBytes; byte < std::filesystem::file_size(file); byte += 300) flip(file, 8 * byte);
  }
  uint32_t refused = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    try {
      CHECK_EQ(get_versions(*volume, table, kBytes, {row})[0], small.newest[row]);
      CHECK_EQ(small.newest[row], 0u);  // all others are damaged
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kDamagedRecord);
      CHECK(std::string(e.what()).find("table 't', row " + std::to_string(row) + " ") != std::string::npos);
      ++refused;
    }
  }
  CHECK_EQ(refused, kRows - std::count(small.newest.begin(), small.newest.end(), 0u));
  CHECK(refused >= 75);  // 50 rows at version 2, 25 at version 1
}

TEST_ON_EACH_MEDIUM("rows that are taken in one batch with a damaged row are not given up") {
  const Small small(medium);
  const auto volume = open_volume(small.options);
  const TableId table = volume->table({"t", kRows, kBytes}, {});
  const auto take = [&](const std::vector<int64_t>& rows) {
    std::vector<std::byte> records(rows.size() * kBytes);
    std::vector<GetRequest> requests;
    requests.push_back({table, rows, {}, {{records.data(), kBytes, kBytes}}, true});
    for (size_t i = 0; i < rows.size(); ++i) requests[0].slots.push_back(static_cast<int32_t>(i));
    volume->wait(volume->submit_get(std::move(requests)));
  };
  const BlockShape shape = BlockShape::of(kBytes);
  for (const std::string& file : small.files()) {  // the second record of each block
    for (uint64_t block = 0; file.ends_with(".log") && block < 12; ++block) {
      flip(file, 8 * (kPageBytes + block * shape.block_bytes + shape.stride_bytes + 100));
    }
  }
  check_error(ErrorKind::kDamagedRecord, [&] { take(rows_up_to(kRows)); });
  uint32_t damaged = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    try {
      CHECK_EQ(get_versions(*volume, table, kBytes, {row})[0], small.newest[row]);
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kDamagedRecord);
      ++damaged;
    }
  }
  CHECK(damaged > 0 && damaged < 20);
  volume->checkpoint(small.epoch + 1);
  take({96});  // the first record of its block
  check_error(ErrorKind::kVolume, [&] { volume->checkpoint(small.epoch + 2); });  // its newest value is with who took it
  put_versions(*volume, table, kBytes, {96}, {7});
  volume->checkpoint(small.epoch + 2);
}

TEST_ON_EACH_MEDIUM("a file that is cut short or missing is a typed error when the volume is opened") {
  const Small small(medium);
  for (const std::string& file : small.files()) {
    const std::string aside = file + ".aside";
    std::filesystem::rename(file, aside);
    const bool segment = file.ends_with(".log"), manifest = file.find("manifest_") != std::string::npos;
    // A missing manifest is a checkpoint that never was. An index that only an older checkpoint names is not read.
    const auto is_refused = [&] {
      if (segment || manifest || file == small.index_file()) {
        check_error(ErrorKind::kDamagedRecord, [&] { small.read(); });
      } else {
        CHECK(small.read() == small.newest);
      }
    };
    if (!manifest) is_refused();
    for (const uint64_t share : {0, 1, 2}) {
      std::filesystem::copy_file(aside, file);
      std::filesystem::resize_file(file, segment ? share * 3000 : std::filesystem::file_size(file) * share / 3);
      is_refused();
      std::filesystem::remove(file);
    }
    std::filesystem::rename(aside, file);
  }
  CHECK(small.read() == small.newest);
}

TEST("a manifest under another epoch's name is a typed error") {
  const Small small("pread");
  std::filesystem::rename(small.manifest_file(small.epoch), small.manifest_file(small.epoch + 1));
  check_error(ErrorKind::kDamagedRecord, [&] { small.read(); });
}

}  // namespace
}  // namespace mtrains::test
