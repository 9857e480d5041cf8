// Files changed behind a volume's back: a typed error, or nothing of it is ever served.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "check.h"
#include "media.h"

namespace mtrains::test {
namespace {

constexpr uint32_t kBytes = 300;
constexpr int64_t kRows = 100;

struct Small {  // two checkpoints: even rows at version 1, then rows below 50 at version 2
  Folder folder;
  SsdOptions options = options_for("pread", {folder.path()}, 64u << 20);
  std::vector<uint64_t> first = std::vector<uint64_t>(kRows, 0), second;

  Small() {
    const auto volume = open_volume(options);
    const TableId table = volume->table({"t", kRows, kBytes}, {});
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < kRows; r += 2) rows.push_back(r);
    put_versions(*volume, table, kBytes, rows, std::vector<uint64_t>(rows.size(), 1));
    for (const int64_t r : rows) first[r] = 1;
    volume->checkpoint(1);
    second = first;
    rows = rows_up_to(50);
    put_versions(*volume, table, kBytes, rows, std::vector<uint64_t>(rows.size(), 2));
    for (const int64_t r : rows) second[r] = 2;
    volume->checkpoint(2);
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
  const File opened(open(file.c_str(), O_RDWR));
  uint8_t byte;
  CHECK(pread(opened.fd(), &byte, 1, static_cast<off_t>(bit / 8)) == 1);
  byte ^= static_cast<uint8_t>(1 << (bit % 8));
  CHECK(pwrite(opened.fd(), &byte, 1, static_cast<off_t>(bit / 8)) == 1);
}

bool is_typed(ErrorKind kind) {
  return kind == ErrorKind::kDamagedRecord || kind == ErrorKind::kVolumeMismatch || kind == ErrorKind::kVolumeIo;
}

TEST("a flipped bit of a volume's files is a typed error when it is opened, or changes no row") {
  Random random = fresh_random();
  const Small small;
  CHECK(small.read() == small.second);
  uint32_t refused = 0;
  for (const std::string& file : small.files()) {
    // Most of a segment is room that no checkpoint counts: look where it is written.
    const uint64_t bits = 8 * std::min<uint64_t>(std::filesystem::file_size(file), kPageBytes + 60'000);
    for (uint32_t i = 0; i < 60 * rounds(); ++i) {
      const uint64_t bit = i < 8 * 64 && i % 2 ? below(random, std::min<uint64_t>(bits, 8 * 64)) : below(random, bits);
      flip(file, bit);
      try {
        CHECK(small.read() == small.second);
      } catch (const Error& e) {
        CHECK(is_typed(e.kind()));
        ++refused;
      }
      flip(file, bit);
    }
  }
  CHECK(refused > 0);
  CHECK(small.read() == small.second);
}

TEST("a bit that flips under an open volume is a typed error that names the row, and the other rows read on") {
  const Small small;
  const auto volume = open_volume(small.options);
  const TableId table = volume->table({"t", kRows, kBytes}, {});
  for (const std::string& file : small.files()) {
    if (!file.ends_with(".log")) continue;
    for (uint64_t byte = kPageBytes; byte < kPageBytes + 60'000; byte += 100) flip(file, 8 * byte);
  }
  uint32_t refused = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    try {
      CHECK_EQ(get_versions(*volume, table, kBytes, {row})[0], small.second[row]);
      CHECK_EQ(small.second[row], 0u);  // all others are damaged
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kDamagedRecord);
      CHECK(std::string(e.what()).find("table 't', row " + std::to_string(row) + " ") != std::string::npos);
      ++refused;
    }
  }
  CHECK_EQ(refused, 75u);  // 50 rows at version 2, 25 at version 1
}

TEST("a file that is cut short or missing is a typed error when the volume is opened") {
  const Small small;
  for (const std::string& file : small.files()) {
    const std::string aside = file + ".aside";
    std::filesystem::rename(file, aside);
    const bool manifest = file.find("manifest_") != std::string::npos;
    if (!manifest) check_error(ErrorKind::kDamagedRecord, [&] { small.read(); });
    for (const uint64_t share : {0, 1, 2}) {
      std::filesystem::copy_file(aside, file);
      std::filesystem::resize_file(file, manifest ? std::filesystem::file_size(file) * share / 3 : share * 3000);
      check_error(ErrorKind::kDamagedRecord, [&] { small.read(); });
      std::filesystem::remove(file);
    }
    std::filesystem::rename(aside, file);
  }
  CHECK(small.read() == small.second);
}

TEST("a manifest under another epoch's name is a typed error") {
  const Small small;
  std::filesystem::rename(small.folder.path() + "/manifest_0000000000000001.bin", small.folder.path() + "/manifest_0000000000000003.bin");
  check_error(ErrorKind::kDamagedRecord, [&] { small.read(); });
}

}  // namespace
}  // namespace mtrains::test
