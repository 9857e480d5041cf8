#include "io_queue.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "errors.h"
#include "thread_name.h"
#include "trace.h"

namespace mtrains {
namespace {

std::atomic<uint32_t> queues{0};  // of the process
constexpr size_t kAhead = 4;      // completions between the fetch of what was read and its turn; a guess
constexpr uint32_t kLine = 64, kMostAhead = 512;  // bytes

}  // namespace

IoQueue::IoQueue(System& system, const std::string& backend, uint32_t depth, Handler handler)
    : system_(system), depth_(depth), handler_(std::move(handler)), number_(++queues), flying_(depth), started_ns_(depth) {
  const size_t bytes = static_cast<size_t>(depth) * kMostBytes;  // mapped lazily: small blocks touch one page each
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  buffers_ = static_cast<std::byte*>(mapping);
  for (uint32_t tag = depth; tag > 0; --tag) free_tags_.push_back(tag - 1);
  thread_ = std::thread([this, backend] { run(backend); });
  std::unique_lock lock(mutex_);
  wake_.wait(lock, [&] { return started_; });
  if (!failure_.empty()) {
    lock.unlock();
    thread_.join();
    munmap(buffers_, bytes);
    throw Error(ErrorKind::kConfiguration, failure_);
  }
}

IoQueue::~IoQueue() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  munmap(buffers_, static_cast<size_t>(depth_) * kMostBytes);
}

std::string IoQueue::text_of(int error) { return error == kShort ? "it ended early" : std::strerror(error); }

void IoQueue::submit(std::vector<IoJob> jobs) {
  if (jobs.empty()) return;
  {
    std::lock_guard lock(mutex_);
    arrived_.push_back(std::move(jobs));
  }
  wake_.notify_one();
}

bool IoQueue::take(bool idle) {
  std::unique_lock lock(mutex_);
  if (idle) wake_.wait(lock, [&] { return stop_ || !arrived_.empty(); });
  while (!arrived_.empty()) {
    ready_.push_back(std::move(arrived_.front()));
    arrived_.pop_front();
  }
  return !(stop_ && idle && ready_.empty());
}

void IoQueue::start(uint32_t tag) {
  const IoJob& job = flying_[tag];
  std::byte* buffer = job.write ? job.source : buffers_ + static_cast<size_t>(tag) * kMostBytes;
  engine_->start({job.write, job.fd, job.bytes, job.offset, buffer}, tag);
}

void IoQueue::fetch(uint32_t tag) const {
  const IoJob::Ahead& ahead = flying_[tag].ahead;
  const std::byte* from = buffers_ + static_cast<size_t>(tag) * kMostBytes + ahead.first;
  for (uint32_t at = 0; at < std::min(ahead.bytes, kMostAhead); at += kLine) {
    __builtin_prefetch(from + at);
    if (ahead.to) __builtin_prefetch(ahead.to + at, 1);
  }
}

void IoQueue::finish(uint32_t tag, int32_t result, int64_t now_ns) {
  const IoJob job = flying_[tag];
  if (result == -EAGAIN || result == -EINTR) return start(tag);
  const bool whole = result >= 0 && static_cast<uint32_t>(result) == job.bytes;
  flight_ns_ += now_ns - started_ns_[tag];
  if (free_tags_.size() + 1 == depth_) busy_ns_ += now_ns - busy_since_ns_;
  if (Trace::shared().on()) Trace::shared().add({job.write ? "write" : "read", started_ns_[tag], now_ns, job.bytes, number_, tag});
  const std::byte* data = job.write ? nullptr : buffers_ + static_cast<size_t>(tag) * kMostBytes;
  handler_(job, data, whole ? 0 : result < 0 ? -result : kShort);
  free_tags_.push_back(tag);
}

void IoQueue::run(const std::string& backend) {
  name_thread("mtrains-io");
  {
    std::unique_lock lock(mutex_);
    if (backend != "pread") engine_ = make_uring_engine(depth_, &reason_);
    if (!engine_ && backend == "io_uring") failure_ = "backend io_uring was asked for, but " + reason_;
    if (!engine_ && failure_.empty()) engine_ = make_pread_engine(depth_, system_);
    if (engine_) {
      backend_ = engine_->name();
      unregistered_ = engine_->register_buffers({buffers_, kMostBytes, kRegisteredBytes});
    }
    started_ = true;
    wake_.notify_all();
    if (!engine_) return;
  }
  std::vector<IoCompletion> completions(depth_);
  while (take(free_tags_.size() == depth_ && ready_.empty())) {
    int64_t now_ns = Trace::now_ns();  // of all that this thread starts, and then hears of, together
    while (!free_tags_.empty() && !ready_.empty()) {
      const uint32_t tag = free_tags_.back();
      free_tags_.pop_back();
      flying_[tag] = ready_.front()[next_];
      started_ns_[tag] = now_ns;
      if (free_tags_.size() + 1 == depth_) busy_since_ns_ = started_ns_[tag];
      start(tag);
      if (++next_ == ready_.front().size()) {
        ready_.pop_front();
        next_ = 0;
      }
    }
    const size_t flying = depth_ - free_tags_.size();
    if (flying == 0) continue;
    // Many completions a system call: of a full queue a third, as the others keep the device busy until this thread has a processor
    // again; of few in flight an eighth, since a new job waits here, too.
    const size_t stay = depth_ - depth_ / 3;
    const size_t least = std::max({size_t{1}, flying / 8, flying - std::min(flying, stay)});
    const size_t n = engine_->reap(completions, least);
    now_ns = Trace::now_ns();
    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n) fetch(completions[i + kAhead].tag);
      finish(completions[i].tag, completions[i].result, now_ns);
    }
  }
  engine_.reset();
}

}  // namespace mtrains
