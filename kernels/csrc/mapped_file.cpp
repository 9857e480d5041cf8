#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>

#include "errors.h"

namespace mtrains {
namespace {

constexpr int kTries = 100;  // names that another may have taken

}  // namespace

Mapping::Mapping(const File& file, const std::string& name, uint64_t bytes, bool writable) : bytes_(bytes) {
  void* address = file.system().mmap(file.fd(), bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ);
  if (address == MAP_FAILED) throw_io("map " + std::to_string(bytes) + " bytes of", name, errno);
  data_ = static_cast<std::byte*>(address);
}

Mapping::~Mapping() {
  if (data_) munmap(data_, bytes_);
}

Mapping map_unnamed_file(System& system, const std::string& folder, uint64_t bytes) {
  bytes = std::max<uint64_t>(bytes, 1);
  std::random_device random;
  std::string name;
  File file;
  for (int tries = 0; tries < kTries && !file.is_open() && (tries == 0 || errno == EEXIST); ++tries) {
    name = folder + "/mtrains_cache_" + std::to_string(random());
    file = File(system, system.open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
  }
  if (!file.is_open()) {
    throw Error(ErrorKind::kVolumeIo, "cannot create a cache file in '" + folder + "': " + std::strerror(errno) +
                                          "; name a writable folder on a DAX, CXL or tmpfs mount");
  }
  system.unlink(name.c_str());
  if (system.fallocate(file.fd(), static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    throw Error(error == ENOSPC || error == EDQUOT || error == EFBIG ? ErrorKind::kVolumeFull : ErrorKind::kVolumeIo,
                "cannot take " + std::to_string(bytes) + " bytes for a cache in '" + folder + "': " + std::strerror(error) +
                    ". Nothing is left there. Ask for fewer rows, make room, or name another folder");
  }
  return Mapping(file, name, bytes, true);
}

}  // namespace mtrains
