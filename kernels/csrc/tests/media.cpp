#include "media.h"

#include <cstdlib>
#include <cstring>
#include <numeric>

namespace mtrains::test {

Folder::Folder() {
  std::string name = std::filesystem::current_path() / "native_test_XXXXXX";
  if (!mkdtemp(name.data())) throw Failure("cannot make a folder below " + std::filesystem::current_path().string());
  path_ = name;
}

Folder::~Folder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::vector<std::string> Folder::stripes(size_t count) const {
  std::vector<std::string> paths;
  for (size_t i = 0; i < count; ++i) {
    paths.push_back(path_ + "/" + std::to_string(i));
    std::filesystem::create_directory(paths.back());
  }
  return paths;
}

bool Folder::holds(const std::string& prefix) const {
  for (const auto& file : std::filesystem::directory_iterator(path_)) {
    if (file.path().filename().string().starts_with(prefix)) return true;
  }
  return false;
}

LogOptions options_for(const std::string& medium, std::vector<std::string> paths, uint64_t capacity_bytes) {
  LogOptions options;
  options.paths = std::move(paths);
  options.capacity_bytes = capacity_bytes;
  options.mapped = medium == "mapped";
  options.backend = options.mapped ? "" : medium;
  options.depth = 8;
  return options;
}

std::unique_ptr<LogVolume> open_volume(const LogOptions& options) {
  if (options.backend == "io_uring") {
    std::string reason;
    if (!make_uring_engine(1, &reason)) throw Skipped(reason);
  }
  return std::make_unique<LogVolume>(options);
}

void write_record(std::byte* record, uint32_t record_bytes, int64_t row, uint64_t version) {
  std::memcpy(record, &version, 8);
  const uint64_t key = static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u + version * 0xBF58476D1CE4E5B9u;
  for (uint32_t i = 8; i < record_bytes; ++i) record[i] = version == 0 ? std::byte{0} : static_cast<std::byte>((key >> (i % 57)) + i);
}

uint64_t version_of(const std::byte* record, uint32_t record_bytes, int64_t row) {
  uint64_t version;
  std::memcpy(&version, record, 8);
  std::vector<std::byte> want(record_bytes);
  write_record(want.data(), record_bytes, row, version);
  if (std::memcmp(want.data(), record, record_bytes) != 0) {
    throw Failure("row " + std::to_string(row) + " reads as no version of itself (it begins as version " + std::to_string(version) + ")");
  }
  return version;
}

namespace {

std::vector<int32_t> slots_up_to(size_t count) {
  std::vector<int32_t> slots(count);
  std::iota(slots.begin(), slots.end(), 0);
  return slots;
}

}  // namespace

void put_versions(Volume& volume, TableId table, uint32_t record_bytes, const std::vector<int64_t>& rows,
                  const std::vector<uint64_t>& versions) {
  std::vector<std::byte> records(rows.size() * record_bytes);
  for (size_t i = 0; i < rows.size(); ++i) write_record(records.data() + i * record_bytes, record_bytes, rows[i], versions[i]);
  // Two parts, as of a row's weights and its optimizer state.
  const Part parts[] = {{records.data(), record_bytes, 8}, {records.data() + 8, record_bytes, record_bytes - 8}};
  volume.put(table, rows, slots_up_to(rows.size()), std::span(parts, record_bytes > 8 ? 2 : 1));
}

std::vector<uint64_t> get_versions(Volume& volume, TableId table, uint32_t record_bytes, const std::vector<int64_t>& rows) {
  std::vector<std::byte> records(rows.size() * record_bytes, std::byte{0xEE});
  std::vector<Part> parts = {{records.data(), record_bytes, record_bytes}};
  std::vector<GetRequest> requests;
  requests.push_back({table, rows, slots_up_to(rows.size()), std::move(parts)});
  volume.wait(volume.submit_get(std::move(requests)));
  std::vector<uint64_t> versions;
  for (size_t i = 0; i < rows.size(); ++i) versions.push_back(version_of(records.data() + i * record_bytes, record_bytes, rows[i]));
  return versions;
}

std::vector<int64_t> rows_up_to(int64_t count) {
  std::vector<int64_t> rows(static_cast<size_t>(count));
  std::iota(rows.begin(), rows.end(), int64_t{0});
  return rows;
}

}  // namespace mtrains::test
