// FaultySystem: a System that fails on demand, for tests. Volumes on it read and write through the pread engine.
//
// A fault is armed with a countdown: it strikes the n-th call from now that it can strike, once. What each does:
//   kShortRead        a read returns fewer bytes than there are
//   kTornWrite        a write stores its first sectors alone, and reports success
//   kLostWrite        a write stores nothing, and reports success
//   kMisdirectedWrite a write lands a page further on, and reports success
//   kBitFlip          a write stores one bit wrong, and reports success
//   kReadError        a read fails with EIO          kWriteError  a write fails with EIO
//   kNoSpace          an allocation or write fails with ENOSPC
//   kOpenError        a file cannot be opened or created (EIO)
//   kMapError         a file cannot be mapped (ENOMEM)
//   kSyncError        an fsync or fdatasync fails with EIO, and what it should have saved is no longer promised
//   kDelay            a read or write takes 20 ms
//
// power_loss() ends the system: every later call fails, and of what was written, created, renamed or removed but not
// synced, a random part is undone, in sectors of 512 bytes. What was synced stays.
//
// What is stored to a mapped file does not pass here: it is neither spoilt nor undone.
#pragma once

#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "system.h"

namespace mtrains {

enum class Fault {
  kShortRead,
  kTornWrite,
  kLostWrite,
  kMisdirectedWrite,
  kBitFlip,
  kReadError,
  kWriteError,
  kNoSpace,
  kOpenError,
  kMapError,
  kSyncError,
  kDelay,
};

class FaultySystem final : public System {
 public:
  explicit FaultySystem(uint64_t seed) : random_(seed) {}
  ~FaultySystem() override;

  void arm(Fault fault, uint64_t countdown);
  uint64_t struck() const;  // faults that have happened
  void power_loss();

  int open(const char* path, int flags, mode_t mode) override;
  int close(int fd) override;
  ssize_t pread(int fd, void* data, size_t bytes, off_t offset) override;
  ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset) override;
  int fallocate(int fd, off_t bytes) override;
  void* mmap(int fd, size_t bytes, int protection) override;
  int fdatasync(int fd) override;
  int fsync(int fd) override;
  int rename(const char* from, const char* to) override;
  int unlink(const char* path) override;

 private:
  struct Write {  // one sector that is not synced: what it held before
    off_t offset;
    std::vector<char> before;
  };
  struct Name {  // one change of a folder that is not synced
    enum { kCreated, kRenamed, kRemoved } what;
    std::string path, other;  // other: where a renamed file was, or where what a path lost is kept
  };

  bool strikes(Fault fault);
  int sync(int fd);
  void remember(int fd, off_t offset, size_t bytes);
  std::string set_aside(const std::string& path);

  mutable std::mutex mutex_;
  std::mt19937_64 random_;
  std::map<Fault, uint64_t> armed_;
  uint64_t struck_ = 0, aside_ = 0;
  bool dead_ = false;
  std::map<int, std::string> paths_;                      // of open descriptors
  std::map<std::string, std::vector<Write>> unsynced_;    // by path, oldest first
  std::map<std::string, std::vector<Name>> names_;        // by folder, oldest first
};

}  // namespace mtrains
