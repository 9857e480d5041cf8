// Files of a byte-addressable device (DAX, CXL, tmpfs), mapped. Opening them, taking their room and mapping them go through System;
// loads and stores are the processor's own, and no seam sees them.
//
// An unnamed file has mode 0600 and loses its name as soon as it is open, so that nothing is left of it however the process ends.
// Its space is taken at once: a device that is too small is met here (kVolumeFull), and never as a SIGBUS at a later store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "volume_folder.h"

namespace mtrains {

class Mapping {  // of the first bytes of a file; it stays when the file is closed, and is unmapped at its own end
 public:
  Mapping() = default;
  Mapping(const File& file, const std::string& name, uint64_t bytes, bool writable);  // kVolumeIo
  ~Mapping();
  Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// Bytes in an unnamed file in a folder: kVolumeIo, kVolumeFull.
Mapping map_unnamed_file(System& system, const std::string& folder, uint64_t bytes);

}  // namespace mtrains
