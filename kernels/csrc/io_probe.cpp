#include "io_probe.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "errors.h"
#include "io_engine.h"
#include "log_format.h"
#include "volume_folder.h"

namespace mtrains {
namespace {

double now(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

}  // namespace

ProbeResult random_reads(const std::string& file, uint32_t block_bytes, uint32_t depth, double seconds, const std::string& backend,
                         uint64_t seed) {
  System& system = System::real();
  File opened(system, system.open(file.c_str(), O_RDONLY | O_DIRECT, 0));
  if (!opened.is_open() && errno == EINVAL) opened = File(system, system.open(file.c_str(), O_RDONLY, 0));
  struct stat info{};
  if (!opened.is_open() || fstat(opened.fd(), &info) != 0) throw_io("open", file, errno);
  const uint64_t blocks = static_cast<uint64_t>(info.st_size) / block_bytes;
  if (blocks == 0 || block_bytes % kPageBytes != 0 || depth < 1) {
    throw Error(ErrorKind::kConfiguration, "random_reads needs a file of at least one block, blocks of whole 4096 bytes and a depth");
  }
  std::string reason;
  std::unique_ptr<IoEngine> engine;
  if (backend != "pread") engine = make_uring_engine(depth, &reason);
  if (!engine && backend == "io_uring") throw Error(ErrorKind::kConfiguration, "backend io_uring was asked for, but " + reason);
  if (!engine) engine = make_pread_engine(depth, System::real());
  const std::unique_ptr<std::byte, void (*)(void*)> buffers(
      static_cast<std::byte*>(std::aligned_alloc(kPageBytes, uint64_t{depth} * block_bytes)), [](void* p) { std::free(p); });
  (void)engine->register_buffers({buffers.get(), block_bytes, block_bytes});  // as a queue does: with or without
  std::mt19937_64 random(seed);
  auto start = [&](uint32_t tag) {
    engine->start({false, opened.fd(), block_bytes, random() % blocks * block_bytes, buffers.get() + uint64_t{tag} * block_bytes}, tag);
  };
  const double begin = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
  for (uint32_t tag = 0; tag < depth; ++tag) start(tag);
  std::vector<IoCompletion> completions(depth);
  uint64_t reads = 0;
  uint32_t flying = depth;
  while (flying > 0) {
    const bool on = now(CLOCK_MONOTONIC) - begin < seconds;
    const size_t n = engine->reap(completions, std::max<size_t>(1, flying / 8));
    for (size_t i = 0; i < n; ++i) {
      if (completions[i].result != static_cast<int32_t>(block_bytes)) throw_io("read", file, std::max(0, -completions[i].result));
      ++reads;
      if (on) {
        start(completions[i].tag);
      } else {
        --flying;
      }
    }
  }
  return {reads, now(CLOCK_MONOTONIC) - begin, now(CLOCK_THREAD_CPUTIME_ID) - cpu};
}

}  // namespace mtrains
