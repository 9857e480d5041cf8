// The io_uring engine. This file alone knows liburing.
#include "io_engine.h"

#ifdef MTRAINS_WITH_LIBURING

#include <liburing.h>

#include <sys/uio.h>

#include <cstring>
#include <vector>

#include "errors.h"

namespace mtrains {
namespace {

class UringEngine final : public IoEngine {
 public:
  explicit UringEngine(uint32_t depth) : depth_(depth), completions_(depth) {}
  ~UringEngine() override {
    if (open_) io_uring_queue_exit(&ring_);
  }

  int open(uint32_t depth) {
    // One thread submits and reaps, so completions need not interrupt it (Linux 6.1); older kernels get a plain ring.
    for (const unsigned flags : {unsigned{IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN}, 0u}) {
      io_uring_params params{};
      params.flags = flags;
      const int result = io_uring_queue_init_params(depth, &ring_, &params);
      if (result == 0) {
        open_ = true;
        return 0;
      }
      if (result != -EINVAL) return result;
    }
    return -EINVAL;
  }

  const char* name() const override { return "io_uring"; }

  std::string register_buffers(const IoBuffers& buffers) override {
    std::vector<iovec> places(depth_);
    for (uint32_t tag = 0; tag < depth_; ++tag) places[tag] = {buffers.first + tag * buffers.stride, buffers.bytes};
    const int result = io_uring_register_buffers(&ring_, places.data(), depth_);
    if (result == 0) {
      registered_ = buffers;
      return "";
    }
    return "the kernel does not register " + std::to_string(depth_ * buffers.bytes) + " bytes of buffers (" + std::strerror(-result) +
           (result == -ENOMEM ? "; RLIMIT_MEMLOCK, ulimit -l, bounds them)" : ")");
  }

  void start(const IoCommand& command, uint32_t tag) override {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    if (!sqe) {
      submit(0);
      sqe = io_uring_get_sqe(&ring_);
    }
    if (!command.write && command.bytes <= registered_.bytes && command.buffer == registered_.first + tag * registered_.stride) {
      io_uring_prep_read_fixed(sqe, command.fd, command.buffer, command.bytes, command.offset, static_cast<int>(tag));
    } else if (command.write) {
      io_uring_prep_write(sqe, command.fd, command.buffer, command.bytes, command.offset);
    } else {
      io_uring_prep_read(sqe, command.fd, command.buffer, command.bytes, command.offset);
    }
    io_uring_sqe_set_data64(sqe, tag);
  }

  size_t reap(std::span<IoCompletion> out, size_t least) override {
    submit(static_cast<unsigned>(least));
    const unsigned n = io_uring_peek_batch_cqe(&ring_, completions_.data(),
                                               static_cast<unsigned>(std::min(out.size(), completions_.size())));
    for (unsigned i = 0; i < n; ++i) {
      out[i] = {static_cast<uint32_t>(io_uring_cqe_get_data64(completions_[i])), completions_[i]->res};
    }
    io_uring_cq_advance(&ring_, n);
    return n;
  }

 private:
  void submit(unsigned least) {
    for (;;) {
      const int result = least > 0 ? io_uring_submit_and_wait(&ring_, least) : io_uring_submit_and_get_events(&ring_);
      if (result >= 0) return;
      if (result == -EINTR) continue;
      if (result == -EAGAIN || result == -EBUSY) {  // the kernel is short of memory for requests: completions free some
        if (io_uring_cq_ready(&ring_) > 0) return;
        continue;
      }
      throw Error(ErrorKind::kVolumeIo, std::string("io_uring_enter failed: ") + std::strerror(-result));
    }
  }

  const uint32_t depth_;
  io_uring ring_{};
  bool open_ = false;
  IoBuffers registered_{};
  std::vector<io_uring_cqe*> completions_;
};

}  // namespace

std::unique_ptr<IoEngine> make_uring_engine(uint32_t depth, std::string* reason) {
  auto engine = std::make_unique<UringEngine>(depth);
  const int result = engine->open(depth);
  if (result == 0) return engine;
  *reason = std::string("the kernel refuses io_uring (") + std::strerror(-result) + ")";
  return nullptr;
}

}  // namespace mtrains

#else

namespace mtrains {

std::unique_ptr<IoEngine> make_uring_engine(uint32_t, std::string* reason) {
  *reason = "this build has no liburing";
  return nullptr;
}

}  // namespace mtrains

#endif
