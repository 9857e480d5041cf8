// VolumeFolder: the files of one volume below one path: its lock, its segments, and (below the first path) its manifests and
// index snapshots.
//
// Files are 0600. A segment is made by fallocate, so that a full disk is met here and never in the middle of a write. A
// manifest is written aside, synced and renamed; its folder is synced before it counts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "system.h"

namespace mtrains {

class File {  // owns a descriptor
 public:
  File() = default;
  File(System& system, int fd) : system_(&system), fd_(fd) {}
  ~File() { reset(); }
  File(File&& other) noexcept : system_(other.system_), fd_(other.fd_) { other.fd_ = -1; }
  File& operator=(File&& other) noexcept {
    if (this != &other) {
      reset();
      system_ = other.system_;
      fd_ = other.fd_;
      other.fd_ = -1;
    }
    return *this;
  }
  File(const File&) = delete;
  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  System& system() const { return *system_; }
  void reset();

 private:
  System* system_ = &System::real();
  int fd_ = -1;
};

class VolumeFolder {
 public:
  enum class Access { kWrite, kWriteMapped, kRead };

  // A writer takes the lock: kVolumeIo, kVolumeLocked.
  VolumeFolder(System& system, std::string path, Access access);
  const std::string& path() const { return path_; }
  bool direct() const { return direct_; }  // whether segments are opened with O_DIRECT

  std::vector<uint32_t> segments() const;   // numbers, ascending
  std::vector<uint64_t> manifests() const;  // epochs, ascending
  std::vector<uint64_t> snapshots() const;  // epochs, ascending
  std::string segment_file(uint32_t number) const;
  std::string manifest_file(uint64_t epoch) const;
  std::string snapshot_file(uint64_t epoch) const;

  File create_segment(uint32_t number, uint64_t bytes) const;  // kVolumeFull where the disk is
  File open_segment(uint32_t number) const;                    // kDamagedRecord when it is missing
  void remove_segment(uint32_t number) const;
  std::vector<std::byte> read_manifest(uint64_t epoch) const;
  // kVolumeFull: it was not committed. kVolumeIo: it may have been.
  void commit_manifest(uint64_t epoch, const std::vector<std::byte>& bytes) const;
  void remove_manifest(uint64_t epoch) const;
  File create_snapshot(uint64_t epoch) const;
  File open_snapshot(uint64_t epoch) const;  // kDamagedRecord when it is missing
  void remove_snapshot(uint64_t epoch) const;
  void sync() const;  // the folder itself: names of files
  void remove_unfinished() const;

 private:
  File open_file(const std::string& file, int flags) const;

  System* system_;
  std::string path_;
  Access access_;
  File lock_;
  bool direct_ = false;
};

[[noreturn]] void throw_io(const std::string& what, const std::string& file, int error);
void sync_file(const File& file, const std::string& name);
void read_whole(const File& file, void* data, uint64_t bytes, uint64_t offset, const std::string& name);   // kDamagedRecord at its end
void require_bytes(const File& file, uint64_t bytes, const std::string& name);  // kDamagedRecord where it is shorter
void write_whole(const File& file, const void* data, uint64_t bytes, uint64_t offset, const std::string& name);

}  // namespace mtrains
