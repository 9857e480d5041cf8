#include "volume_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "errors.h"
#include "log_format.h"

namespace mtrains {
namespace {

constexpr char kLockName[] = "volume.lock";

// Numbers of the files named prefix + hexadecimal digits + suffix.
std::vector<uint64_t> numbered(const std::string& folder, const std::string& prefix, const std::string& suffix) {
  std::vector<uint64_t> numbers;
  DIR* dir = opendir(folder.c_str());
  if (!dir) throw_io("open folder", folder, errno);
  while (const dirent* entry = readdir(dir)) {
    const std::string name = entry->d_name;
    if (name.size() <= prefix.size() + suffix.size() || !name.starts_with(prefix) || !name.ends_with(suffix)) continue;
    const std::string digits = name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
    if (digits.find_first_not_of("0123456789abcdef") != std::string::npos || digits.size() > 16) continue;
    numbers.push_back(std::stoull(digits, nullptr, 16));
  }
  closedir(dir);
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

std::string hexadecimal(uint64_t number, int digits) {
  char text[17];
  std::snprintf(text, sizeof text, "%0*llx", digits, static_cast<unsigned long long>(number));
  return text;
}

void write_all(int fd, const void* data, size_t n, const std::string& file) {
  const auto* p = static_cast<const char*>(data);
  while (n > 0) {
    const ssize_t done = write(fd, p, n);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw_io("write", file, errno);
    p += done;
    n -= static_cast<size_t>(done);
  }
}

}  // namespace

void File::reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void throw_io(const std::string& what, const std::string& file, int error) {
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    throw Error(ErrorKind::kVolumeFull, "cannot " + what + " " + file + ": " + std::strerror(error) +
                                            ". Everything up to the last checkpoint is intact. Make room on that file system, or "
                                            "give the volume another path");
  }
  throw Error(ErrorKind::kVolumeIo, "cannot " + what + " " + file + ": " + std::strerror(error));
}

void sync_file(int fd, const std::string& file) {
  if (fdatasync(fd) != 0) throw_io("sync", file, errno);
}

VolumeFolder::VolumeFolder(std::string path) : path_(std::move(path)) {
  struct stat info{};
  if (stat(path_.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    throw Error(ErrorKind::kVolumeIo, "SSD path '" + path_ + "' is not a folder; create it first, on the device that should hold "
                                          "the tables");
  }
  const std::string file = path_ + "/" + kLockName;
  lock_ = File(open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock_.is_open()) throw_io("open", file, errno);
  if (flock(lock_.fd(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) throw_io("lock", file, errno);
    char owner[128] = {};
    const ssize_t n = pread(lock_.fd(), owner, sizeof owner - 1, 0);
    throw Error(ErrorKind::kVolumeLocked,
                "the volume in '" + path_ + "' is open for writing" + (n > 0 ? " by " + std::string(owner) : "") +
                    ": one writer at a time. Close it there, or name another path");
  }
  char host[65] = {};
  gethostname(host, sizeof host - 1);
  const std::string owner = "process " + std::to_string(getpid()) + " on " + host;
  if (ftruncate(lock_.fd(), 0) != 0 || pwrite(lock_.fd(), owner.data(), owner.size(), 0) < 0) throw_io("write", file, errno);
  const std::string probe = path_ + "/direct.tmp";
  const File direct(open(probe.c_str(), O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600));
  if (!direct.is_open() && errno != EINVAL) throw_io("create a file in", path_, errno);
  direct_ = direct.is_open();
  unlink(probe.c_str());
}

std::vector<uint32_t> VolumeFolder::segments() const {
  std::vector<uint32_t> result;
  for (const uint64_t n : numbered(path_, "segment_", ".log")) result.push_back(static_cast<uint32_t>(n));
  return result;
}

std::vector<uint64_t> VolumeFolder::manifests() const { return numbered(path_, "manifest_", ".bin"); }

std::string VolumeFolder::segment_file(uint32_t number) const { return path_ + "/segment_" + hexadecimal(number, 8) + ".log"; }

std::string VolumeFolder::manifest_file(uint64_t epoch) const { return path_ + "/manifest_" + hexadecimal(epoch, 16) + ".bin"; }

File VolumeFolder::open_data(const std::string& file, int flags) const {
  return File(open(file.c_str(), flags | O_CLOEXEC | (direct_ ? O_DIRECT : 0), 0600));
}

File VolumeFolder::create_segment(uint32_t number, uint64_t bytes) {
  const std::string file = segment_file(number);
  File made = open_data(file, O_RDWR | O_CREAT | O_TRUNC);
  if (!made.is_open()) throw_io("create", file, errno);
  const auto size = static_cast<off_t>(bytes);
  if (fallocate(made.fd(), 0, 0, size) != 0 && (errno != EOPNOTSUPP || ftruncate(made.fd(), size) != 0)) {
    const int error = errno;
    unlink(file.c_str());
    throw_io("allocate " + std::to_string(bytes) + " bytes for", file, error);
  }
  return made;
}

File VolumeFolder::open_segment(uint32_t number) const {
  const std::string file = segment_file(number);
  File found = open_data(file, O_RDWR);
  if (!found.is_open() && errno == ENOENT) {
    throw Error(ErrorKind::kDamagedRecord, "segment " + file + " belongs to a checkpoint and is missing. Restore the volume from a copy");
  }
  if (!found.is_open()) throw_io("open", file, errno);
  return found;
}

void VolumeFolder::remove_segment(uint32_t number) const { unlink(segment_file(number).c_str()); }

std::vector<std::byte> VolumeFolder::read_manifest(uint64_t epoch) const {
  const std::string file = manifest_file(epoch);
  const File opened(open(file.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat info{};
  if (!opened.is_open() || fstat(opened.fd(), &info) != 0) throw_io("open", file, errno);
  std::vector<std::byte> bytes(static_cast<size_t>(info.st_size));
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = pread(opened.fd(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw_io("read", file, errno);
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  bytes.resize(done);
  return bytes;
}

void VolumeFolder::commit_manifest(uint64_t epoch, const std::vector<std::byte>& bytes) const {
  const std::string final = manifest_file(epoch), aside = final + ".tmp";
  File made(open(aside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!made.is_open()) throw_io("create", aside, errno);
  write_all(made.fd(), bytes.data(), bytes.size(), aside);
  if (fsync(made.fd()) != 0) throw_io("sync", aside, errno);
  made.reset();
  if (rename(aside.c_str(), final.c_str()) != 0) throw_io("rename", aside, errno);
  sync();
}

void VolumeFolder::remove_manifest(uint64_t epoch) const {
  const std::string file = manifest_file(epoch);
  if (unlink(file.c_str()) != 0 && errno != ENOENT) throw_io("remove", file, errno);
}

void VolumeFolder::sync() const {
  const File folder(open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder.is_open() || fsync(folder.fd()) != 0) throw_io("sync folder", path_, errno);
}

void VolumeFolder::remove_unfinished() const {
  for (const uint64_t epoch : numbered(path_, "manifest_", ".bin.tmp")) unlink((manifest_file(epoch) + ".tmp").c_str());
}

}  // namespace mtrains
