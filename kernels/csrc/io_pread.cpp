// The fallback engine: a pool of threads that call pread and pwrite.
#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <semaphore>
#include <thread>
#include <vector>

#include "thread_name.h"

#include "io_engine.h"

namespace mtrains {
namespace {

constexpr uint32_t kMostThreads = 32;  // enough to keep a device busy: 64 preadv threads reached 78K reads/s, 16 about 60K

class PreadEngine final : public IoEngine {
 public:
  PreadEngine(uint32_t depth, System& system) : system_(system) {
    for (uint32_t i = 0; i < std::min(depth, kMostThreads); ++i) threads_.emplace_back([this] { serve(); });
  }

  ~PreadEngine() override {
    work_.release(static_cast<std::ptrdiff_t>(threads_.size()));
    for (std::thread& t : threads_) t.join();
  }

  const char* name() const override { return "pread"; }
  std::string register_buffers(const IoBuffers&) override { return "pread has no registered buffers"; }

  void start(const IoCommand& command, uint32_t tag) override {
    {
      std::lock_guard lock(mutex_);
      commands_.push_back({command, tag});
    }
    work_.release();
  }

  size_t reap(std::span<IoCompletion> out, size_t least) override {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return completions_.size() >= least; });
    const size_t n = std::min(out.size(), completions_.size());
    std::copy_n(completions_.begin(), n, out.begin());
    completions_.erase(completions_.begin(), completions_.begin() + static_cast<std::ptrdiff_t>(n));
    return n;
  }

 private:
  int32_t move(const IoCommand& c) const {
    uint32_t moved = 0;
    while (moved < c.bytes) {
      const ssize_t n = c.write ? system_.pwrite(c.fd, c.buffer + moved, c.bytes - moved, static_cast<off_t>(c.offset + moved))
                                : system_.pread(c.fd, c.buffer + moved, c.bytes - moved, static_cast<off_t>(c.offset + moved));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return -errno;
      if (n == 0) break;
      moved += static_cast<uint32_t>(n);
    }
    return static_cast<int32_t>(moved);
  }

  void serve() {
    name_thread("mtrains-pread");
    for (;;) {
      work_.acquire();
      std::unique_lock lock(mutex_);
      if (commands_.empty()) return;  // stopped
      const auto [command, tag] = commands_.front();
      commands_.pop_front();
      lock.unlock();
      const int32_t result = move(command);
      lock.lock();
      completions_.push_back({tag, result});
      done_.notify_one();
    }
  }

  System& system_;
  std::mutex mutex_;
  std::counting_semaphore<> work_{0};  // commands. No condition variable: where many threads wait, glibc before 2.41 may lose a signal (BZ 25847)
  std::condition_variable done_;
  std::deque<std::pair<IoCommand, uint32_t>> commands_;
  std::deque<IoCompletion> completions_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<IoEngine> make_pread_engine(uint32_t depth, System& system) { return std::make_unique<PreadEngine>(depth, system); }

}  // namespace mtrains
