#include "faulty_system.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

namespace mtrains {
namespace {

constexpr size_t kSectorBytes = 512;

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

int fail(int error) {
  errno = error;
  return -1;
}

// Without O_DIRECT, whose rules on alignment the injected faults would break.
int plain(int flags) { return flags & ~O_DIRECT; }

}  // namespace

FaultySystem::~FaultySystem() {
  for (const auto& [folder, names] : names_) {
    for (const Name& n : names) {
      if (n.what == Name::kRemoved) ::unlink(n.other.c_str());
    }
  }
}

void FaultySystem::arm(Fault fault, uint64_t countdown) {
  std::lock_guard lock(mutex_);
  armed_[fault] = countdown;
}

uint64_t FaultySystem::struck() const {
  std::lock_guard lock(mutex_);
  return struck_;
}

bool FaultySystem::strikes(Fault fault) {
  const auto at = armed_.find(fault);
  if (at == armed_.end()) return false;
  if (at->second > 0) {
    --at->second;
    return false;
  }
  armed_.erase(at);
  ++struck_;
  return true;
}

int FaultySystem::open(const char* path, int flags, mode_t mode) {
  std::lock_guard lock(mutex_);
  if (dead_ || strikes(Fault::kOpenError)) return fail(EIO);
  const bool is_new = (flags & O_CREAT) && ::access(path, F_OK) != 0;
  const int fd = System::open(path, plain(flags), mode);
  if (fd < 0) return fd;
  paths_[fd] = path;
  if (is_new) names_[folder_of(path)].push_back({Name::kCreated, path, ""});
  return fd;
}

int FaultySystem::close(int fd) {
  std::lock_guard lock(mutex_);
  paths_.erase(fd);
  return System::close(fd);
}

ssize_t FaultySystem::pread(int fd, void* data, size_t bytes, off_t offset) {
  std::unique_lock lock(mutex_);
  if (dead_) return fail(EIO);
  if (strikes(Fault::kReadError)) return fail(EIO);
  if (strikes(Fault::kDelay)) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    lock.lock();
  }
  const ssize_t n = System::pread(fd, data, bytes, offset);
  return n > 1 && strikes(Fault::kShortRead) ? n / 2 : n;
}

void FaultySystem::remember(int fd, off_t offset, size_t bytes) {
  std::vector<Write>& writes = unsynced_[paths_[fd]];
  for (size_t done = 0; done < bytes; done += kSectorBytes) {
    Write w{offset + static_cast<off_t>(done), std::vector<char>(std::min(kSectorBytes, bytes - done))};
    const ssize_t n = System::pread(fd, w.before.data(), w.before.size(), w.offset);
    std::fill(w.before.begin() + std::max<ssize_t>(n, 0), w.before.end(), 0);
    writes.push_back(std::move(w));
  }
}

ssize_t FaultySystem::pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  std::unique_lock lock(mutex_);
  if (dead_) return fail(EIO);
  if (strikes(Fault::kWriteError)) return fail(EIO);
  if (strikes(Fault::kNoSpace)) return fail(ENOSPC);
  if (strikes(Fault::kDelay)) {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    lock.lock();
    if (dead_) return fail(EIO);
  }
  const auto all = static_cast<ssize_t>(bytes);
  if (strikes(Fault::kLostWrite)) return all;
  std::vector<char> stored(static_cast<const char*>(data), static_cast<const char*>(data) + bytes);
  if (strikes(Fault::kBitFlip) && bytes > 0) stored[random_() % bytes] ^= static_cast<char>(1 << random_() % 8);
  if (strikes(Fault::kTornWrite)) stored.resize(random_() % ((bytes + kSectorBytes - 1) / kSectorBytes) * kSectorBytes);
  if (strikes(Fault::kMisdirectedWrite)) offset += 4096;
  if (stored.empty()) return all;
  remember(fd, offset, stored.size());
  const ssize_t n = System::pwrite(fd, stored.data(), stored.size(), offset);
  return n == static_cast<ssize_t>(stored.size()) ? all : n;
}

int FaultySystem::fallocate(int fd, off_t bytes) {
  std::lock_guard lock(mutex_);
  if (dead_) return fail(EIO);
  return strikes(Fault::kNoSpace) ? fail(ENOSPC) : System::fallocate(fd, bytes);
}

void* FaultySystem::mmap(int fd, size_t bytes, int protection) {
  std::lock_guard lock(mutex_);
  if (dead_ || strikes(Fault::kMapError)) {
    errno = dead_ ? EIO : ENOMEM;
    return MAP_FAILED;
  }
  return System::mmap(fd, bytes, protection);
}

int FaultySystem::sync(int fd) {
  std::lock_guard lock(mutex_);
  if (dead_) return fail(EIO);
  if (strikes(Fault::kSyncError)) return fail(EIO);
  const std::string path = paths_[fd];
  unsynced_.erase(path);
  for (const Name& n : names_[path]) {
    if (n.what == Name::kRemoved) ::unlink(n.other.c_str());
  }
  names_.erase(path);
  return 0;
}

int FaultySystem::fdatasync(int fd) { return sync(fd); }
int FaultySystem::fsync(int fd) { return sync(fd); }

std::string FaultySystem::set_aside(const std::string& path) {
  const std::string aside = folder_of(path) + "/." + std::to_string(aside_++) + ".aside";
  ::link(path.c_str(), aside.c_str());
  return aside;
}

int FaultySystem::rename(const char* from, const char* to) {
  std::lock_guard lock(mutex_);
  if (dead_) return fail(EIO);
  const int result = System::rename(from, to);
  if (result != 0) return result;
  names_[folder_of(to)].push_back({Name::kRenamed, to, from});
  if (auto node = unsynced_.extract(from)) {
    node.key() = to;
    unsynced_.insert(std::move(node));
  }
  return 0;
}

int FaultySystem::unlink(const char* path) {
  std::lock_guard lock(mutex_);
  if (dead_) return fail(EIO);
  const std::string aside = ::access(path, F_OK) == 0 ? set_aside(path) : "";
  const int result = System::unlink(path);
  if (!aside.empty()) names_[folder_of(path)].push_back({Name::kRemoved, path, aside});
  return result;
}

void FaultySystem::power_loss() {
  std::lock_guard lock(mutex_);
  dead_ = true;
  for (auto& [path, writes] : unsynced_) {
    const int fd = ::open(path.c_str(), O_WRONLY);
    if (fd < 0) continue;
    for (auto w = writes.rbegin(); w != writes.rend(); ++w) {
      if (random_() % 2) [[maybe_unused]] const ssize_t n = ::pwrite(fd, w->before.data(), w->before.size(), w->offset);
    }
    ::close(fd);
  }
  // A folder's changes reach the disk in order: a random number of the last ones is undone.
  for (auto& [folder, names] : names_) {
    size_t undone = random_() % (names.size() + 1);
    for (auto n = names.rbegin(); n != names.rend(); ++n) {
      if (undone > 0) {
        --undone;
        if (n->what == Name::kCreated) ::unlink(n->path.c_str());
        if (n->what == Name::kRenamed) ::rename(n->path.c_str(), n->other.c_str());
        if (n->what == Name::kRemoved) ::rename(n->other.c_str(), n->path.c_str());
      } else if (n->what == Name::kRemoved) {
        ::unlink(n->other.c_str());
      }
    }
  }
  names_.clear();
}

}  // namespace mtrains
