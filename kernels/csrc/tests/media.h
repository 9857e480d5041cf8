// Volumes under test: where they lie, and records that show what they are.
//
// A record of (row, version) holds the version in its first eight bytes and a pattern of both in the rest, so that a stale,
// torn or misplaced one is told apart; version 0 is a row never put, all zeros.
#pragma once

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "log_volume.h"

namespace mtrains::test {

// Registers the test once for each I/O back end, named by `backend` in its body.
#define TEST_ON_EACH_BACKEND(sentence)                                                                      \
  static void MTRAINS_JOIN(test_, __LINE__)(const std::string& backend);                                    \
  static const ::mtrains::test::RegisteredOnEach MTRAINS_JOIN(registered_, __LINE__)(                       \
      sentence, {"pread", "io_uring"}, MTRAINS_JOIN(test_, __LINE__));                                      \
  static void MTRAINS_JOIN(test_, __LINE__)(const std::string& backend)

// The same for each medium that a volume can lie on: blocks through one of the back ends, or "mapped" files.
#define TEST_ON_EACH_MEDIUM(sentence)                                                                       \
  static void MTRAINS_JOIN(test_, __LINE__)(const std::string& medium);                                     \
  static const ::mtrains::test::RegisteredOnEach MTRAINS_JOIN(registered_, __LINE__)(                       \
      sentence, {"pread", "io_uring", "mapped"}, MTRAINS_JOIN(test_, __LINE__));                            \
  static void MTRAINS_JOIN(test_, __LINE__)(const std::string& medium)

struct RegisteredOnEach {
  RegisteredOnEach(const std::string& sentence, const std::vector<std::string>& names, void (*body)(const std::string&)) {
    for (const std::string& name : names) tests().push_back({sentence + " (" + name + ")", [=] { body(name); }});
  }
};

// A new folder below the working directory (/tmp may be in memory, where there is no O_DIRECT), removed at the end.
class Folder {
 public:
  Folder();
  ~Folder();
  Folder(const Folder&) = delete;
  const std::string& path() const { return path_; }
  std::vector<std::string> stripes(size_t count) const;  // folders in it
  bool holds(const std::string& prefix) const;           // a file whose name begins so

 private:
  std::string path_;
};

LogOptions options_for(const std::string& medium, std::vector<std::string> paths, uint64_t capacity_bytes);
std::unique_ptr<LogVolume> open_volume(const LogOptions& options);  // Skipped where the kernel forbids io_uring

void write_record(std::byte* record, uint32_t record_bytes, int64_t row, uint64_t version);
uint64_t version_of(const std::byte* record, uint32_t record_bytes, int64_t row);  // fails for a record that is none

void put_versions(Volume& volume, TableId table, uint32_t record_bytes, const std::vector<int64_t>& rows,
                  const std::vector<uint64_t>& versions);
std::vector<uint64_t> get_versions(Volume& volume, TableId table, uint32_t record_bytes, const std::vector<int64_t>& rows);
std::vector<int64_t> rows_up_to(int64_t count);

}  // namespace mtrains::test
