#include "io_probe.h"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

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

double quantile_us(std::vector<float>& seconds, double q) {
  const auto at = seconds.begin() + static_cast<ptrdiff_t>(q * static_cast<double>(seconds.size() - 1));
  std::nth_element(seconds.begin(), at, seconds.end());
  return 1e6 * static_cast<double>(*at);
}

File open_to_probe(const std::string& file, bool writes) {
  System& system = System::real();
  const int flags = writes ? O_RDWR : O_RDONLY;
  File opened(system, system.open(file.c_str(), flags | O_DIRECT, 0));
  if (!opened.is_open() && errno == EINVAL) opened = File(system, system.open(file.c_str(), flags, 0));
  if (!opened.is_open()) throw_io("open", file, errno);
  return opened;
}

}  // namespace

IoProbe random_io(const std::vector<std::string>& files, uint32_t block_bytes, uint32_t depth, double read_share, double seconds,
                  const std::string& backend, uint64_t seed) {
  std::vector<File> opened;
  std::vector<uint64_t> ends;  // of each file, in blocks of all files one after the other
  uint64_t blocks = 0;
  for (const std::string& file : files) {
    opened.push_back(open_to_probe(file, read_share < 1));
    const off_t written = lseek(opened.back().fd(), 0, SEEK_HOLE);
    if (written < 0 && errno != ENXIO) throw_io("open", file, errno);  // ENXIO: an empty file
    blocks += block_bytes && written > 0 ? static_cast<uint64_t>(written) / block_bytes : 0;
    ends.push_back(blocks);
  }
  if (blocks == 0 || block_bytes % kPageBytes != 0 || depth < 1 || !(read_share >= 0 && read_share <= 1)) {
    throw Error(ErrorKind::kConfiguration,
                "random_io needs files of at least one block, blocks of whole 4096 bytes, a depth, and a share between 0 and 1");
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
  for (uint64_t at = 0; at < uint64_t{depth} * block_bytes; at += sizeof(uint64_t)) {
    const uint64_t noise = random();
    std::memcpy(buffers.get() + at, &noise, sizeof noise);
  }
  std::bernoulli_distribution reads(read_share);
  std::vector<double> started(depth);
  std::vector<float> took;
  auto start = [&](uint32_t tag, double at) {
    started[tag] = at;
    const bool write = !reads(random);
    const uint64_t block = random() % blocks;
    const auto file = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), block) - ends.begin());
    const uint64_t offset = (block - (file ? ends[file - 1] : 0)) * block_bytes;
    engine->start({write, opened[file].fd(), block_bytes, offset, buffers.get() + uint64_t{tag} * block_bytes}, tag);
  };
  const double begin = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
  for (uint32_t tag = 0; tag < depth; ++tag) start(tag, begin);
  std::vector<IoCompletion> completions(depth);
  uint32_t flying = depth;
  while (flying > 0) {
    const size_t n = engine->reap(completions, std::max<size_t>(1, flying / 8));
    const double at = now(CLOCK_MONOTONIC);
    for (size_t i = 0; i < n; ++i) {
      if (completions[i].result != static_cast<int32_t>(block_bytes)) {
        throw_io("read or write", files.front(), std::max(0, -completions[i].result));
      }
      took.push_back(static_cast<float>(at - started[completions[i].tag]));
      if (at - begin < seconds) {
        start(completions[i].tag, at);
      } else {
        --flying;
      }
    }
  }
  const double spent = now(CLOCK_MONOTONIC) - begin, cpu_spent = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
  return {took.size(), spent, cpu_spent, quantile_us(took, 0.5), quantile_us(took, 0.99)};
}

}  // namespace mtrains
