#include "memory_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>

#include "errors.h"
#include "mapped_file.h"

namespace mtrains {
namespace {

constexpr uint64_t kLineBytes = 64;
constexpr uint64_t kChunkBytes = 1u << 20;      // between looks at the clock
constexpr uint64_t kMostChainBytes = 128u << 20;  // making a chain costs more than walking it

using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

std::atomic<uint64_t> sink;  // what is read must not be dropped

uint64_t sum(const std::byte* from, uint64_t bytes) {
  uint64_t sums[8] = {};
  for (uint64_t at = 0; at + kLineBytes <= bytes; at += kLineBytes) {
    uint64_t words[8];
    std::memcpy(words, from + at, sizeof words);
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
  }
  return std::accumulate(sums, sums + 8, uint64_t{0});
}

// Repeats chunk(place, bytes) over each thread's share until `seconds` are over, once at least: a busy machine may start a thread later than
// that. Returns bytes a second.
template <class Chunk>
double bytes_per_s(std::byte* area, uint64_t bytes, uint32_t threads, double seconds, Chunk chunk) {
  const uint64_t share = bytes / threads, step = std::min(kChunkBytes, share);
  std::vector<uint64_t> done(threads);
  std::vector<std::thread> running;
  const auto begin = Clock::now();
  for (uint32_t t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      uint64_t at = 0;
      do {
        chunk(area + t * share + at, step);
        done[t] += step;
        at = at + 2 * step <= share ? at + step : 0;
      } while (since(begin) < seconds);
    });
  }
  for (auto& thread : running) thread.join();
  return static_cast<double>(std::accumulate(done.begin(), done.end(), uint64_t{0})) / since(begin);
}

double rows_per_s(const std::byte* area, uint64_t bytes, uint32_t row_bytes, double seconds, std::mt19937_64& random) {
  constexpr size_t kBatch = 4096;
  std::vector<uint64_t> places(kBatch);
  std::vector<std::byte> to(kBatch * row_bytes);
  const uint64_t rows = bytes / row_bytes;
  uint64_t done = 0;
  double spent = 0;
  while (spent < seconds) {
    for (auto& place : places) place = random() % rows * row_bytes;
    const auto begin = Clock::now();
    for (size_t i = 0; i < kBatch; ++i) std::memcpy(to.data() + i * row_bytes, area + places[i], row_bytes);
    spent += since(begin);
    sink += static_cast<uint64_t>(to[done % to.size()]);
    done += kBatch;
  }
  return static_cast<double>(done) / spent;
}

double latency_ns(std::byte* area, uint64_t bytes, double seconds, std::mt19937_64& random) {
  const uint64_t lines = std::max<uint64_t>(2, std::min(bytes, kMostChainBytes) / kLineBytes), apart = bytes / lines / kLineBytes * kLineBytes;
  std::vector<uint32_t> order(lines);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (uint64_t i = 0; i < lines; ++i) {
    const uint64_t next = order[(i + 1) % lines] * apart;
    std::memcpy(area + order[i] * apart, &next, sizeof next);
  }
  uint64_t at = order[0] * apart, done = 0;
  const auto begin = Clock::now();
  do {
    for (int i = 0; i < 1000; ++i) std::memcpy(&at, area + at, sizeof at);
    done += 1000;
  } while (since(begin) < seconds);
  const double spent = since(begin);
  sink += at;
  return 1e9 * spent / static_cast<double>(done);
}

}  // namespace

MemoryProbe probe_memory(const std::string& folder, uint64_t bytes, uint32_t threads, const std::vector<uint32_t>& row_bytes,
                         double seconds, uint64_t seed) {
  const uint32_t longest = row_bytes.empty() ? 0 : *std::max_element(row_bytes.begin(), row_bytes.end());
  const bool rows_ok = std::all_of(row_bytes.begin(), row_bytes.end(), [](uint32_t b) { return b > 0; });
  if (threads < 1 || bytes / threads < std::max<uint64_t>(longest, 2 * kLineBytes) || !rows_ok || !(seconds > 0)) {
    throw Error(ErrorKind::kConfiguration, "probe_memory needs threads, room for two cache lines and a row each, rows of some bytes, and time");
  }
  const Mapping mapping = folder.empty() ? Mapping() : map_unnamed_file(System::real(), folder, bytes);
  const std::unique_ptr<std::byte[]> own(folder.empty() ? new std::byte[bytes] : nullptr);
  std::byte* area = folder.empty() ? own.get() : mapping.data();
  std::mt19937_64 random(seed);
  std::memset(area, 1, bytes);
  MemoryProbe result{};
  result.read_bytes_per_s =
      bytes_per_s(area, bytes, threads, seconds, [](const std::byte* from, uint64_t n) { sink += sum(from, n); });
  result.write_bytes_per_s = bytes_per_s(area, bytes, threads, seconds, [](std::byte* to, uint64_t n) { std::memset(to, 2, n); });
  for (const uint32_t b : row_bytes) result.rows_per_s.push_back(rows_per_s(area, bytes, b, seconds, random));
  result.latency_ns = latency_ns(area, bytes, seconds, random);
  return result;
}

}  // namespace mtrains
