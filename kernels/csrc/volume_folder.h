// VolumeFolder: the files of one volume below one path: its lock, its segments, and (below the first path) its manifests.
//
// Files are 0600. A segment is made by fallocate, so that a full disk is met here and never in the middle of a write. A
// manifest is written aside, synced and renamed; its folder is synced before it counts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mtrains {

class File {  // owns a descriptor
 public:
  File() = default;
  explicit File(int fd) : fd_(fd) {}
  ~File() { reset(); }
  File(File&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  File& operator=(File&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = other.fd_;
      other.fd_ = -1;
    }
    return *this;
  }
  File(const File&) = delete;
  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_ = -1;
};

class VolumeFolder {
 public:
  explicit VolumeFolder(std::string path);  // takes the lock: kVolumeIo, kVolumeLocked
  const std::string& path() const { return path_; }
  bool direct() const { return direct_; }  // whether the file system takes O_DIRECT

  std::vector<uint32_t> segments() const;   // numbers, ascending
  std::vector<uint64_t> manifests() const;  // epochs, ascending
  std::string segment_file(uint32_t number) const;
  std::string manifest_file(uint64_t epoch) const;

  File create_segment(uint32_t number, uint64_t bytes);  // kVolumeFull where the disk is
  File open_segment(uint32_t number) const;              // kDamagedRecord when it is missing
  void remove_segment(uint32_t number) const;
  std::vector<std::byte> read_manifest(uint64_t epoch) const;
  void commit_manifest(uint64_t epoch, const std::vector<std::byte>& bytes) const;
  void remove_manifest(uint64_t epoch) const;
  void sync() const;  // the folder itself: names of files
  void remove_unfinished() const;

 private:
  File open_data(const std::string& file, int flags) const;

  std::string path_;
  File lock_;
  bool direct_ = true;
};

[[noreturn]] void throw_io(const std::string& what, const std::string& file, int error);
void sync_file(int fd, const std::string& file);

}  // namespace mtrains
