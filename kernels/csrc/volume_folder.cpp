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

}  // namespace

void File::reset() {
  if (fd_ >= 0) system_->close(fd_);
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

void sync_file(const File& file, const std::string& name) {
  if (file.system().fdatasync(file.fd()) != 0) throw_io("sync", name, errno);
}

void require_bytes(const File& file, uint64_t bytes, const std::string& name) {
  struct stat info{};
  if (fstat(file.fd(), &info) != 0) throw_io("look at", name, errno);
  if (static_cast<uint64_t>(info.st_size) >= bytes) return;
  throw Error(ErrorKind::kDamagedRecord, "file " + name + " has " + std::to_string(info.st_size) + " bytes, its checkpoint counts on " +
                                             std::to_string(bytes) + ". Restore the volume from a copy");
}

void read_whole(const File& file, void* data, uint64_t bytes, uint64_t offset, const std::string& name) {
  auto* p = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = file.system().pread(file.fd(), p, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw_io("read", name, errno);
    if (n == 0) {
      throw Error(ErrorKind::kDamagedRecord, name + " ends at byte " + std::to_string(offset) + ", it should have " +
                                                 std::to_string(bytes) + " more. Restore the volume from a copy");
    }
    p += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<uint64_t>(n);
  }
}

void write_whole(const File& file, const void* data, uint64_t bytes, uint64_t offset, const std::string& name) {
  const auto* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = file.system().pwrite(file.fd(), p, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw_io("write", name, errno);
    p += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<uint64_t>(n);
  }
}

VolumeFolder::VolumeFolder(System& system, std::string path, Access access)
    : system_(&system), path_(std::move(path)), access_(access) {
  struct stat info{};
  if (stat(path_.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    throw Error(ErrorKind::kVolumeIo, "path '" + path_ + "' is not a folder; create it first, on the device that should hold the "
                                          "tables");
  }
  const std::string probe = path_ + "/direct.tmp";
  if (access == Access::kRead) {
    direct_ = true;  // open_file goes without where it is refused
    return;
  }
  const std::string file = path_ + "/" + kLockName;
  lock_ = open_file(file, O_RDWR | O_CREAT);
  if (!lock_.is_open()) throw_io("open", file, errno);
  if (flock(lock_.fd(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) throw_io("lock", file, errno);
    char owner[128] = {};
    const ssize_t n = pread(lock_.fd(), owner, sizeof owner - 1, 0);
    throw Error(ErrorKind::kVolumeLocked,
                "the volume in '" + path_ + "' is open for writing" + (n > 0 ? " by " + std::string(owner) : "") +
                    ": one writer at a time. The kernel drops the lock when its owner ends, however it ends; close it there, or "
                    "name another path");
  }
  char host[65] = {};
  gethostname(host, sizeof host - 1);
  const std::string owner = "process " + std::to_string(getpid()) + " on " + host;
  if (ftruncate(lock_.fd(), 0) != 0 || pwrite(lock_.fd(), owner.data(), owner.size(), 0) < 0) throw_io("write", file, errno);
  if (access == Access::kWriteMapped) return;
  const File direct = open_file(probe, O_RDWR | O_CREAT | O_DIRECT);
  if (!direct.is_open() && errno != EINVAL) throw_io("create a file in", path_, errno);
  direct_ = direct.is_open();
  unlink(probe.c_str());
}

File VolumeFolder::open_file(const std::string& file, int flags) const {
  return File(*system_, system_->open(file.c_str(), flags, 0600));
}

std::vector<uint32_t> VolumeFolder::segments() const {
  std::vector<uint32_t> result;
  for (const uint64_t n : numbered(path_, "segment_", ".log")) result.push_back(static_cast<uint32_t>(n));
  return result;
}

std::vector<uint64_t> VolumeFolder::manifests() const { return numbered(path_, "manifest_", ".bin"); }
std::vector<uint64_t> VolumeFolder::snapshots() const { return numbered(path_, "index_", ".bin"); }

std::string VolumeFolder::segment_file(uint32_t number) const { return path_ + "/segment_" + hexadecimal(number, 8) + ".log"; }
std::string VolumeFolder::manifest_file(uint64_t epoch) const { return path_ + "/manifest_" + hexadecimal(epoch, 16) + ".bin"; }
std::string VolumeFolder::snapshot_file(uint64_t epoch) const { return path_ + "/index_" + hexadecimal(epoch, 16) + ".bin"; }

File VolumeFolder::create_segment(uint32_t number, uint64_t bytes) const {
  const std::string file = segment_file(number);
  File made = open_file(file, O_RDWR | O_CREAT | O_TRUNC | (direct_ ? O_DIRECT : 0));
  if (!made.is_open()) throw_io("create", file, errno);
  if (system_->fallocate(made.fd(), static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    system_->unlink(file.c_str());
    throw_io("allocate " + std::to_string(bytes) + " bytes for", file, error);
  }
  return made;
}

File VolumeFolder::open_segment(uint32_t number) const {
  const std::string file = segment_file(number);
  const int flags = access_ == Access::kRead ? O_RDONLY : O_RDWR;
  File found = open_file(file, flags | (direct_ ? O_DIRECT : 0));
  if (!found.is_open() && errno == EINVAL && access_ == Access::kRead) found = open_file(file, flags);
  if (!found.is_open() && errno == ENOENT) {
    throw Error(ErrorKind::kDamagedRecord, "segment " + file + " belongs to a checkpoint and is missing. Restore the volume from a copy");
  }
  if (!found.is_open()) throw_io("open", file, errno);
  return found;
}

void VolumeFolder::remove_segment(uint32_t number) const { system_->unlink(segment_file(number).c_str()); }

std::vector<std::byte> VolumeFolder::read_manifest(uint64_t epoch) const {
  const std::string file = manifest_file(epoch);
  const File opened = open_file(file, O_RDONLY);
  struct stat info{};
  if (!opened.is_open() || fstat(opened.fd(), &info) != 0) throw_io("open", file, errno);
  std::vector<std::byte> bytes(static_cast<size_t>(info.st_size));
  read_whole(opened, bytes.data(), bytes.size(), 0, file);
  return bytes;
}

void VolumeFolder::commit_manifest(uint64_t epoch, const std::vector<std::byte>& bytes) const {
  const std::string final = manifest_file(epoch), aside = final + ".tmp";
  File made = open_file(aside, O_WRONLY | O_CREAT | O_TRUNC);
  if (!made.is_open()) throw_io("create", aside, errno);
  write_whole(made, bytes.data(), bytes.size(), 0, aside);
  if (system_->fsync(made.fd()) != 0) throw_io("sync", aside, errno);
  made.reset();
  if (system_->rename(aside.c_str(), final.c_str()) != 0) throw_io("rename", aside, errno);
  try {
    sync();
  } catch (const Error& e) {
    throw Error(ErrorKind::kVolumeIo, e.what());  // of whatever kind: whether the manifest has its name is not known
  }
}

void VolumeFolder::remove_manifest(uint64_t epoch) const {
  const std::string file = manifest_file(epoch);
  if (system_->unlink(file.c_str()) != 0 && errno != ENOENT) throw_io("remove", file, errno);
}

File VolumeFolder::create_snapshot(uint64_t epoch) const {
  const std::string file = snapshot_file(epoch);
  File made = open_file(file, O_RDWR | O_CREAT | O_TRUNC);
  if (!made.is_open()) throw_io("create", file, errno);
  return made;
}

File VolumeFolder::open_snapshot(uint64_t epoch) const {
  const std::string file = snapshot_file(epoch);
  File found = open_file(file, O_RDONLY);
  if (!found.is_open() && errno == ENOENT) {
    throw Error(ErrorKind::kDamagedRecord, "index " + file + " belongs to a checkpoint and is missing. Restore the volume from a copy");
  }
  if (!found.is_open()) throw_io("open", file, errno);
  return found;
}

void VolumeFolder::remove_snapshot(uint64_t epoch) const { system_->unlink(snapshot_file(epoch).c_str()); }

void VolumeFolder::sync() const {
  const File folder = open_file(path_, O_RDONLY | O_DIRECTORY);
  if (!folder.is_open() || system_->fsync(folder.fd()) != 0) throw_io("sync folder", path_, errno);
}

void VolumeFolder::remove_unfinished() const {
  for (const uint64_t epoch : numbered(path_, "manifest_", ".bin.tmp")) system_->unlink((manifest_file(epoch) + ".tmp").c_str());
}

}  // namespace mtrains
