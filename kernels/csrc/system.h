// System: the calls through which volumes reach the operating system. Everything that a volume does to files goes through
// one of these, or through io_uring, which is used with the real system alone; faults are injected here (faulty_system.h). What a
// mapping is loaded from and stored to passes by.
//
// Each call behaves as the POSIX call of its name: -1 and errno on failure.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace mtrains {

class System {
 public:
  virtual ~System() = default;
  virtual int open(const char* path, int flags, mode_t mode);
  virtual int close(int fd);
  virtual ssize_t pread(int fd, void* data, size_t bytes, off_t offset);
  virtual ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset);
  virtual int fallocate(int fd, off_t bytes);
  virtual void* mmap(int fd, size_t bytes, int protection);  // shared, from the file's beginning; MAP_FAILED on failure
  virtual int fdatasync(int fd);
  virtual int fsync(int fd);
  virtual int rename(const char* from, const char* to);
  virtual int unlink(const char* path);

  static System& real();
};

}  // namespace mtrains
