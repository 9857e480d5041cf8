// MappedFile: bytes of a byte-addressable device (DAX, CXL, tmpfs), mapped from an unnamed file in one of its folders.
//
// The file has mode 0600 and loses its name as soon as it is open, so that nothing is left of it however the process ends.
// Its space is taken at once: a device that is too small is met here (kVolumeFull), and never as a SIGBUS at a later store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace mtrains {

class MappedFile {
 public:
  MappedFile(const std::string& folder, uint64_t bytes);  // kVolumeIo, kVolumeFull
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::byte* data() { return data_; }

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_;
};

}  // namespace mtrains
