// The two I/O engines, and the queue above them.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <set>

#include "check.h"
#include "io_engine.h"
#include "io_queue.h"
#include "media.h"
#include "volume_folder.h"

namespace mtrains::test {
namespace {

constexpr uint32_t kBlock = 4096, kBlocks = 64, kDepth = 8;

struct Buffers {
  explicit Buffers(size_t bytes) : data(static_cast<std::byte*>(std::aligned_alloc(kBlock, bytes))) {}
  ~Buffers() { std::free(data); }
  std::byte* data;
};

void fill_block(std::byte* block, uint32_t number) { std::memset(block, static_cast<int>(number + 1), kBlock); }
bool holds_block(const std::byte* block, uint32_t number) {
  for (uint32_t i = 0; i < kBlock; ++i) {
    if (block[i] != static_cast<std::byte>(number + 1)) return false;
  }
  return true;
}

std::unique_ptr<IoEngine> engine_of(const std::string& backend) {
  std::string reason;
  auto engine = backend == "pread" ? make_pread_engine(kDepth, System::real()) : make_uring_engine(kDepth, &reason);
  if (!engine) throw Skipped(reason);
  CHECK(engine->name() == backend);
  return engine;
}

TEST_ON_EACH_BACKEND("an engine writes and reads what it was told, and names each completion") {
  const auto engine = engine_of(backend);
  const Folder folder;
  const File file(System::real(), open((folder.path() + "/blocks").c_str(), O_RDWR | O_CREAT, 0600));
  const Buffers buffers(kDepth * kBlock);
  for (const bool write : {true, false}) {
    std::vector<uint32_t> block_of(kDepth);
    std::set<uint32_t> flying;
    uint32_t next = 0, done = 0;
    while (done < kBlocks) {
      for (uint32_t tag = 0; tag < kDepth && next < kBlocks; ++tag) {
        if (flying.contains(tag)) continue;
        std::byte* buffer = buffers.data + tag * kBlock;
        if (write) fill_block(buffer, next);
        else std::memset(buffer, 0, kBlock);
        flying.insert(tag);
        block_of[tag] = next;
        engine->start({write, file.fd(), kBlock, uint64_t{next++} * kBlock, buffer}, tag);
      }
      std::array<IoCompletion, kDepth> completions;
      const size_t n = engine->reap(completions, 1);
      CHECK(n >= 1);
      for (size_t i = 0; i < n; ++i, ++done) {
        CHECK(flying.erase(completions[i].tag) == 1);
        CHECK_EQ(completions[i].result, static_cast<int32_t>(kBlock));
        if (!write) CHECK(holds_block(buffers.data + completions[i].tag * kBlock, block_of[completions[i].tag]));
      }
    }
  }
}

TEST_ON_EACH_BACKEND("an engine reports a short read by its length and a failed one by its errno") {
  const auto engine = engine_of(backend);
  const Folder folder;
  const File file(System::real(), open((folder.path() + "/short").c_str(), O_RDWR | O_CREAT, 0600));
  CHECK(ftruncate(file.fd(), 1000) == 0);
  const Buffers buffers(2 * kBlock);
  engine->start({false, file.fd(), kBlock, 0, buffers.data}, 5);
  engine->start({false, -1, kBlock, 0, buffers.data + kBlock}, 6);
  std::set<uint32_t> tags;
  while (tags.size() < 2) {
    std::array<IoCompletion, kDepth> completions;
    const size_t n = engine->reap(completions, 1);
    for (size_t i = 0; i < n; ++i) {
      tags.insert(completions[i].tag);
      CHECK_EQ(completions[i].result, completions[i].tag == 5 ? 1000 : -EBADF);
    }
  }
}

TEST_ON_EACH_BACKEND("a queue calls its handler once for each job of every thread, and finishes them all before it goes") {
  (void)engine_of(backend);
  const Folder folder;
  const File file(System::real(), open((folder.path() + "/blocks").c_str(), O_RDWR | O_CREAT, 0600));
  const Buffers blocks(kBlocks * kBlock);
  for (uint32_t b = 0; b < kBlocks; ++b) fill_block(blocks.data + b * kBlock, b);
  CHECK_EQ(pwrite(file.fd(), blocks.data, kBlocks * kBlock, 0), static_cast<ssize_t>(kBlocks * kBlock));
  constexpr uint32_t kThreads = 3, kJobs = 300;
  std::vector<std::atomic<int>> calls(kThreads * kJobs);
  std::atomic<int> wrong{0};
  {
    IoQueue queue(System::real(), backend, kDepth, [&](const IoJob& job, const std::byte* data, int error) {
      ++calls[job.index];
      const auto block = static_cast<uint32_t>(job.offset / kBlock);
      const bool beyond = block >= kBlocks;
      if (error != (beyond ? IoQueue::kShort : 0) || (!beyond && !holds_block(data, block))) ++wrong;
    });
    CHECK(queue.backend() == backend);
    Threads threads;
    for (uint32_t t = 0; t < kThreads; ++t) {
      threads.start([&, t] {
        for (uint32_t first = 0; first < kJobs; first += 10) {
          std::vector<IoJob> jobs;
          for (uint32_t i = first; i < first + 10; ++i) {
            jobs.push_back({false, file.fd(), kBlock, uint64_t{(i * 7 + t) % (kBlocks + 1)} * kBlock, nullptr, nullptr, t * kJobs + i});
          }
          queue.submit(std::move(jobs));
        }
      });
    }
    threads.join();
  }
  CHECK_EQ(wrong.load(), 0);
  for (const auto& n : calls) CHECK_EQ(n.load(), 1);
}

}  // namespace
}  // namespace mtrains::test
