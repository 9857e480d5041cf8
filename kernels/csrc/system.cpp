#include "system.h"

#include <fcntl.h>
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
  return errno == EOPNOTSUPP ? ::ftruncate(fd, bytes) : -1;  // a file system that cannot: a full disk is then met later
}

System& System::real() {
  static System system;
  return system;
}

}  // namespace mtrains
