#include "system.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace mtrains {

int System::open(const char* path, int flags, mode_t mode) { return ::open(path, flags | O_CLOEXEC, mode); }
int System::close(int fd) { return ::close(fd); }
ssize_t System::pread(int fd, void* data, size_t bytes, off_t offset) { return ::pread(fd, data, bytes, offset); }
ssize_t System::pwrite(int fd, const void* data, size_t bytes, off_t offset) { return ::pwrite(fd, data, bytes, offset); }
int System::fdatasync(int fd) { return ::fdatasync(fd); }
int System::fsync(int fd) { return ::fsync(fd); }
int System::rename(const char* from, const char* to) { return ::rename(from, to); }
int System::unlink(const char* path) { return ::unlink(path); }

int System::fallocate(int fd, off_t bytes) {
  if (::fallocate(fd, 0, 0, bytes) == 0) return 0;
  if (errno != EOPNOTSUPP) return -1;
  // A file system that cannot: libc writes to every block instead, which O_DIRECT refuses; a full disk is then met later.
  const int error = ::posix_fallocate(fd, 0, bytes);
  if (error == EINVAL) return ::ftruncate(fd, bytes);
  errno = error;
  return error == 0 ? 0 : -1;
}

void* System::mmap(int fd, size_t bytes, int protection) { return ::mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0); }

System& System::real() {
  static System system;
  return system;
}

}  // namespace mtrains
