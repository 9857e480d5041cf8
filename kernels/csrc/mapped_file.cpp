#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "errors.h"
#include "system.h"
#include "volume_folder.h"

namespace mtrains {

MappedFile::MappedFile(const std::string& folder, uint64_t bytes) : bytes_(std::max<uint64_t>(bytes, 1)) {
  std::string name = folder + "/mtrains_cache_XXXXXX";
  const File file(System::real(), mkostemp(name.data(), O_CLOEXEC));
  if (!file.is_open()) {
    throw Error(ErrorKind::kVolumeIo, "cannot create a cache file in '" + folder + "': " + std::strerror(errno) +
                                          "; name a writable folder on a DAX, CXL or tmpfs mount");
  }
  unlink(name.c_str());
  if (const int error = posix_fallocate(file.fd(), 0, static_cast<off_t>(bytes_))) {
    throw Error(error == ENOSPC || error == EFBIG ? ErrorKind::kVolumeFull : ErrorKind::kVolumeIo,
                "cannot take " + std::to_string(bytes_) + " bytes for a cache in '" + folder + "': " + std::strerror(error) +
                    ". Nothing is left there. Ask for fewer rows, make room, or name another folder");
  }
  void* address = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0);
  if (address == MAP_FAILED) throw_io("map", name, errno);
  data_ = static_cast<std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_) munmap(data_, bytes_);
}

}  // namespace mtrains
