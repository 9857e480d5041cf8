// Several threads at once. Each row has one writer, whose versions of it only grow; what a reader may find is bounded by
// what the writer had finished before the read and had begun when it was over.
#include <chrono>

#include "check.h"
#include "faulty_system.h"
#include "media.h"

namespace mtrains::test {
namespace {

constexpr uint32_t kBytes = 2000;
constexpr int64_t kRows = 4000;  // 8 MB of records
constexpr uint64_t kCapacity = 32u << 20;

struct Shared {
  explicit Shared(LogVolume& v) : volume(v), table(v.table({"t", kRows, kBytes}, {})), begun(kRows), done(kRows) {}
  LogVolume& volume;
  TableId table;
  std::vector<std::atomic<uint64_t>> begun, done;  // versions, by row
  std::atomic<bool> stop{false};

  std::vector<uint64_t> now(const std::vector<std::atomic<uint64_t>>& versions) const { return {versions.begin(), versions.end()}; }

  // Writer w of n puts random rows of its own, 60 at a time. Faster than the cleaner and the checkpoints it may find the
  // volume full; it tries again then, for as long as others can be expected to make room.
  void write(Random random, int64_t w, int64_t n, uint32_t puts) {
    for (uint32_t p = 0; p < puts && !stop; ++p) {
      std::vector<int64_t> rows;
      std::vector<uint64_t> versions;
      for (int i = 0; i < 60; ++i) {
        const int64_t row = static_cast<int64_t>(below(random, kRows / n)) * n + w;
        rows.push_back(row);
        versions.push_back(++begun[row]);
      }
      for (int tries = 0;; ++tries) {
        try {
          put_versions(volume, table, kBytes, rows, versions);
          break;
        } catch (const Error& e) {
          if (e.kind() != ErrorKind::kVolumeFull || tries == 2000) throw;
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
      }
      for (size_t i = 0; i < rows.size(); ++i) done[rows[i]] = versions[i];
    }
  }

  void read_some(Random& random) {
    std::vector<int64_t> rows(100);
    for (int64_t& r : rows) r = static_cast<int64_t>(below(random, kRows));
    std::vector<uint64_t> least;
    for (const int64_t r : rows) least.push_back(done[r]);
    const std::vector<uint64_t> got = get_versions(volume, table, kBytes, rows);
    for (size_t i = 0; i < rows.size(); ++i) CHECK(got[i] >= least[i] && got[i] <= begun[rows[i]]);
  }
};

TEST_ON_EACH_MEDIUM("readers, writers, the cleaner and checkpoints on threads of their own see no stale and no torn row") {
  Random random = fresh_random();
  const Folder folder;
  LogOptions options = options_for(medium, folder.stripes(2), kCapacity);
  options.keep_checkpoints = 1;
  options.snapshot_after_bytes = 1u << 20;
  std::vector<uint64_t> least, most;  // of the last checkpoint
  {
    const auto volume = open_volume(options);
    Shared shared(*volume);
    Threads writers, others;
    for (int64_t w = 0; w < 2; ++w) {
      writers.start([&, w, seed = random()] { shared.write(Random(seed), w, 2, 250 * rounds()); });
    }
    for (int r = 0; r < 2; ++r) {
      others.start([&, seed = random()] {
        for (Random mine(seed); !shared.stop;) shared.read_some(mine);
      });
    }
    others.start([&] {
      const auto end = [](Shared* s) { s->stop = true; };  // writers need its checkpoints
      const std::unique_ptr<Shared, decltype(end)> guard(&shared, end);
      uint64_t epoch = 0;
      for (bool last = false; !last;) {
        last = shared.stop;
        least = shared.now(shared.done);
        volume->checkpoint(++epoch);
        most = shared.now(shared.begun);
        CHECK_EQ(volume->epochs().back(), epoch);
        CHECK(volume->stats().disk_bytes <= kCapacity);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    });
    std::exception_ptr failed;
    try {
      writers.join();
    } catch (...) {
      failed = std::current_exception();
    }
    shared.stop = true;
    others.join();
    if (failed) std::rethrow_exception(failed);
    CHECK(get_versions(*volume, shared.table, kBytes, rows_up_to(kRows)) == shared.now(shared.done));
    CHECK(volume->stats().cleaned_segments > 0);
    volume->close();
  }
  const auto again = open_volume(options);
  const std::vector<uint64_t> got = get_versions(*again, again->table({"t", kRows, kBytes}, {}), kBytes, rows_up_to(kRows));
  for (int64_t r = 0; r < kRows; ++r) CHECK(got[r] >= least[r] && got[r] <= most[r]);
}

TEST_ON_EACH_MEDIUM("a checkpoint taken while others put opens again, with every row put before it began") {
  Random random = fresh_random();
  for (uint32_t i = 0; i < 25 * rounds(); ++i) {
    const Folder folder;
    LogOptions options = options_for(medium, {folder.path()}, 256u << 20);  // room for what is put until a slow machine commits
    if (i % 2) options.snapshot_after_bytes = 64u << 10;
    std::vector<uint64_t> least, most;
    {
      const auto volume = open_volume(options);
      Shared shared(*volume);
      Threads writers;
      for (int64_t w = 0; w < 2; ++w) {
        writers.start([&, w, seed = random()] { shared.write(Random(seed), w, 2, UINT32_MAX); });
      }
      for (uint64_t epoch = 1; epoch <= 3; ++epoch) {
        std::this_thread::sleep_for(std::chrono::microseconds(below(random, 3000)));
        least = shared.now(shared.done);
        volume->checkpoint(epoch);
        most = shared.now(shared.begun);
      }
      shared.stop = true;
      writers.join();
      volume->close();
    }
    const auto again = open_volume(options);
    const std::vector<uint64_t> got = get_versions(*again, again->table({"t", kRows, kBytes}, {}), kBytes, rows_up_to(kRows));
    for (int64_t r = 0; r < kRows; ++r) CHECK(got[r] >= least[r] && got[r] <= most[r]);
  }
}

// What the checkpoint waits for takes 20 ms; the put in that time fills blocks, and too few of them for a write.
TEST("a checkpoint names no block of a put that came while it waited for its writes") {
  const std::vector<int64_t> rows = rows_up_to(40);
  const std::vector<uint64_t> first(rows.size(), 1), second(rows.size(), 2);
  for (int i = 0; i < 20; ++i) {
    const Folder folder;
    LogOptions options = options_for("pread", {folder.path()}, 64u << 20);
    const auto system = std::make_shared<FaultySystem>(1);
    options.system = system;
    {
      const auto volume = open_volume(options);
      const TableId table = volume->table({"t", kRows, kBytes}, {});
      put_versions(*volume, table, kBytes, rows, first);
      system->arm(Fault::kDelay, 0);
      Threads committer;
      committer.start([&] { volume->checkpoint(1); });
      while (system->struck() == 0 && !committer.failed()) std::this_thread::yield();
      put_versions(*volume, table, kBytes, rows, second);
      committer.join();
      CHECK(get_versions(*volume, table, kBytes, rows) == second);
      volume->close();
    }
    const auto again = open_volume(options);
    CHECK(get_versions(*again, again->table({"t", kRows, kBytes}, {}), kBytes, rows) == first);
  }
}

TEST_ON_EACH_MEDIUM("closing a volume waits for reads in flight, which can be waited for afterwards") {
  const Folder folder;
  const LogOptions options = options_for(medium, {folder.path()}, 64u << 20);
  const auto volume = open_volume(options);
  Shared shared(*volume);
  shared.write(Random(1), 0, 1, 300);
  volume->checkpoint(1);
  const std::vector<int64_t> rows = rows_up_to(kRows);
  const std::vector<int32_t> slots(rows.begin(), rows.end());
  std::vector<std::byte> records(kRows * kBytes, std::byte{0xEE});
  std::vector<GetRequest> requests;
  requests.push_back({shared.table, rows, slots, {{records.data(), kBytes, kBytes}}});
  const uint64_t token = volume->submit_get(std::move(requests));
  CHECK((token == 0) == options.mapped);  // a mapped medium is read at once
  volume->close();
  for (const int64_t r : rows) {  // before wait: close has already waited
    CHECK_EQ(version_of(records.data() + r * kBytes, kBytes, r), shared.done[r].load());
  }
  volume->wait(token);
  if (token != 0) check_error(ErrorKind::kVolume, [&] { volume->wait(token); });
}

// Writes of chunks wait for the gate: a put fills every buffer there is, and waits for one.
class Gate final : public System {
 public:
  ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset) override {
    if (bytes > kPageBytes) open.wait(false);
    return System::pwrite(fd, data, bytes, offset);
  }
  std::atomic<bool> open{false};
};

// A volume behind a gate.
struct Gated {
  Gated() {
    LogOptions options = options_for("pread", {folder.path()}, 1u << 30);
    options.system = gate;
    volume = open_volume(options);
    table = volume->table({"t", 3 * kRows, kBytes}, {});
  }
  void open() {
    gate->open = true;
    gate->open.notify_all();
  }

  const Folder folder;
  const std::shared_ptr<Gate> gate = std::make_shared<Gate>();
  std::unique_ptr<LogVolume> volume;
  TableId table{};
};

TEST("a put that waits for buffers when the volume closes gives the typed error, and writes no more") {
  // Segments of 4 MiB, as long as a put's pieces, have 16 chunks: it waits for its 9th, with much of its piece still to write.
  Gated gated;
  const auto& volume = gated.volume;
  const TableId table = gated.table;
  Threads threads;
  threads.start([&] {
    const std::vector<int64_t> rows = rows_up_to(3 * kRows - 1);  // 24 MB, in one put: the first time that others see a write, it waits
    check_error(ErrorKind::kVolume, [&] { put_versions(*volume, table, kBytes, rows, std::vector<uint64_t>(rows.size(), 1)); });
  });
  uint64_t writes = 0;
  while ((writes = volume->stats().write_ios) == 0 && !threads.failed()) std::this_thread::yield();
  threads.start([&] { volume->close(); });
  const auto is_closed = [&] {
    try {
      get_versions(*volume, table, kBytes, {3 * kRows - 1});
      return false;
    } catch (const Error& e) {
      return e.kind() == ErrorKind::kVolume;
    }
  };
  while (!is_closed()) std::this_thread::yield();
  gated.open();
  threads.join();
  CHECK_EQ(volume->stats().write_ios, writes);
}

TEST("of two flushes that wait for a buffer the one that finds nothing to write writes nothing") {
  Gated gated;
  const auto& volume = gated.volume;
  const TableId table = gated.table;
  // As many as fit into the chunks, and one that is left in the open block.
  std::vector<int64_t> rows;
  while (volume->stats().write_ios < 8) {
    rows.push_back(static_cast<int64_t>(rows.size()));
    put_versions(*volume, table, kBytes, {rows.back()}, {1});
  }
  Threads threads;
  for (int i = 0; i < 2; ++i) threads.start([&] { volume->flush(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // both wait
  gated.open();
  threads.join();
  CHECK_EQ(volume->stats().write_ios, 9u);
  CHECK(get_versions(*volume, table, kBytes, rows) == std::vector<uint64_t>(rows.size(), 1));
}

TEST_ON_EACH_MEDIUM("a volume that closes under readers and writers gives each its values or the typed error") {
  Random random = fresh_random();
  for (uint32_t i = 0; i < 25 * rounds(); ++i) {
    const Folder folder;
    // Half of them so small that writers wait for the cleaner.
    const auto volume = open_volume(options_for(medium, {folder.path()}, i % 2 ? 24u << 20 : 4 * kCapacity));
    Shared shared(*volume);
    Threads threads;
    const auto until_closed = [&](auto&& act) {
      try {
        while (true) act();
      } catch (const Error& e) {
        if (std::string(e.what()).find("is closed") == std::string::npos) throw;
      }
    };
    for (int64_t w = 0; w < 2; ++w) {
      threads.start([&, w, seed = random()] { until_closed([&] { shared.write(Random(seed), w, 2, UINT32_MAX); }); });
    }
    threads.start([&, seed = random()] {
      Random mine(seed);
      until_closed([&] { shared.read_some(mine); });
    });
    threads.start([&] {
      uint64_t epoch = 0;
      until_closed([&] {
        volume->flush();
        if (i % 3 == 0) volume->checkpoint(++epoch);
      });
    });
    std::this_thread::sleep_for(std::chrono::microseconds(below(random, i % 2 ? 60'000 : 10'000)));
    volume->close();
    threads.join();
  }
}

}  // namespace
}  // namespace mtrains::test
