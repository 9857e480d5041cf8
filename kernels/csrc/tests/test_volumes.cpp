// One thread: a volume behaves like the reference, and refuses what it must.
#include <cstring>
#include <map>

#include "check.h"
#include "media.h"
#include "memory_volume.h"

namespace mtrains::test {
namespace {

constexpr int64_t kRows = 60;
constexpr uint32_t kSizes[] = {8, 68, 260, 1500, 5000, 70'000};
using Bytes = std::vector<std::byte>;

class AgainstTheReference {
 public:
  AgainstTheReference(Random& random, const std::string& medium)
      : random_(random), options_(options_for(medium, folder_.stripes(1 + below(random, 2)), 64u << 20)) {
    options_.keep_checkpoints = static_cast<uint32_t>(1 + below(random, 3));
    options_.snapshot_after_bytes = random() % 2 ? 64u << 10 : UINT64_MAX;
    for (uint64_t t = 1 + below(random, 3); t > 0; --t) sizes_.push_back(kSizes[below(random, std::size(kSizes))]);
    model_ = std::make_unique<MemoryVolume>();
    add_tables(*model_);
    open();
  }

  void step() {
    const uint64_t choice = below(random_, 20);
    if (choice < 9) put();
    else if (choice < 15) get();
    else if (choice < 16) volume_->flush();
    else if (choice < 18) checkpoint();
    else if (choice < 19 && !committed_.empty()) reopen();
    else if (!committed_.empty()) restore();
  }

  void compare_everything() {
    for (TableId t = 0; t < sizes_.size(); ++t) CHECK(read(*volume_, t, rows_up_to(kRows)) == read(*model_, t, rows_up_to(kRows)));
  }

 private:
  void add_tables(Volume& volume) {
    for (size_t t = 0; t < sizes_.size(); ++t) {
      const Initializer init = t % 2 ? Initializer{} : Initializer{false, 9, -1.0f, 1.0f, 0, {{0, 2}}, WeightType::kFloat32};
      CHECK_EQ(volume.table({std::string("t").append(std::to_string(t)), kRows, sizes_[t]}, init), t);
    }
  }
  void open() {
    volume_ = open_volume(options_);
    add_tables(*volume_);
  }
  Bytes read(Volume& volume, TableId table, const std::vector<int64_t>& rows) {
    Bytes out(rows.size() * sizes_[table], std::byte{0xEE});
    std::vector<int32_t> slots(rows.size());
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int32_t>(i);
    std::vector<GetRequest> requests;
    requests.push_back({table, rows, slots, {{out.data(), sizes_[table], sizes_[table]}}});
    volume.wait(volume.submit_get(std::move(requests)));
    return out;
  }
  std::vector<int64_t> some_rows() {
    std::vector<int64_t> rows(below(random_, 40));
    for (int64_t& r : rows) r = static_cast<int64_t>(below(random_, random_() % 2 ? 5 : kRows));
    return rows;
  }
  void put() {
    const auto t = static_cast<TableId>(below(random_, sizes_.size()));
    const std::vector<int64_t> rows = some_rows();
    std::vector<int32_t> slots;
    for (size_t i = 0; i < rows.size(); ++i) slots.push_back(static_cast<int32_t>(rows.size() - 1 - i));
    Bytes values(rows.size() * sizes_[t]);
    for (size_t i = 0; i + 8 <= values.size(); i += 8) {
      const uint64_t word = random_();
      std::memcpy(values.data() + i, &word, 8);
    }
    const Part part{values.data(), sizes_[t], sizes_[t]};
    for (Volume* v : {static_cast<Volume*>(volume_.get()), static_cast<Volume*>(model_.get())}) v->put(t, rows, slots, {&part, 1});
  }
  void get() {
    const auto t = static_cast<TableId>(below(random_, sizes_.size()));
    const std::vector<int64_t> rows = some_rows();
    CHECK(read(*volume_, t, rows) == read(*model_, t, rows));
  }
  void checkpoint() {
    volume_->checkpoint(++epoch_);
    for (TableId t = 0; t < sizes_.size(); ++t) committed_[epoch_].push_back(read(*model_, t, rows_up_to(kRows)));
    while (committed_.size() > options_.keep_checkpoints) committed_.erase(committed_.begin());
    check_epochs();
  }
  void check_epochs() {
    std::vector<uint64_t> want;
    for (const auto& [epoch, values] : committed_) want.push_back(epoch);
    CHECK(volume_->epochs() == want);
  }
  void reopen() {
    if (random_() % 2) volume_->close();
    volume_.reset();
    open();
    go_back_to(committed_.rbegin()->first);
  }
  void restore() {
    auto at = committed_.begin();
    std::advance(at, static_cast<std::ptrdiff_t>(below(random_, committed_.size())));
    volume_->restore(at->first);
    go_back_to(at->first);
  }
  void go_back_to(uint64_t epoch) {
    committed_.erase(committed_.upper_bound(epoch), committed_.end());
    epoch_ = epoch;
    check_epochs();
    model_ = std::make_unique<MemoryVolume>();
    add_tables(*model_);
    const std::vector<int64_t> rows = rows_up_to(kRows);
    const std::vector<int32_t> slots(rows.begin(), rows.end());
    for (TableId t = 0; t < sizes_.size(); ++t) {
      const Part part{committed_[epoch][t].data(), sizes_[t], sizes_[t]};
      model_->put(t, rows, slots, {&part, 1});
    }
    compare_everything();
  }

  Random& random_;
  const Folder folder_;
  LogOptions options_;
  std::vector<uint32_t> sizes_;
  std::unique_ptr<MemoryVolume> model_;
  std::unique_ptr<LogVolume> volume_;
  std::map<uint64_t, std::vector<Bytes>> committed_;  // by epoch, then table
  uint64_t epoch_ = 0;
};

TEST_ON_EACH_MEDIUM("a volume reads as the reference does, through flushes, checkpoints, reopening and going back") {
  Random random = fresh_random();
  for (uint32_t i = 0; i < 12 * rounds(); ++i) {
    AgainstTheReference history(random, medium);
    for (int step = 0; step < 60; ++step) history.step();
    history.compare_everything();
  }
}

TEST_ON_EACH_MEDIUM("a volume that is written over many times stays within its capacity and keeps every newest row") {
  Random random = fresh_random();
  const Folder folder;
  const uint64_t capacity = 48u << 20;
  const auto volume = open_volume(options_for(medium, folder.stripes(2), capacity));
  constexpr uint32_t kBytes = 2000;
  constexpr int64_t kCount = 4000;  // 8 MB of records
  const TableId table = volume->table({"t", kCount, kBytes}, {});
  std::vector<uint64_t> newest(kCount, 0);
  uint64_t epoch = 0;
  for (uint64_t version = 1; version <= 200 * rounds(); ++version) {
    std::vector<int64_t> rows(200);
    for (int64_t& r : rows) r = static_cast<int64_t>(below(random, kCount));
    put_versions(*volume, table, kBytes, rows, std::vector<uint64_t>(rows.size(), version));
    for (const int64_t r : rows) newest[r] = version;
    CHECK(volume->stats().disk_bytes <= capacity);
    if (volume->wants_checkpoint() || version % 100 == 0) volume->checkpoint(++epoch);
  }
  CHECK(get_versions(*volume, table, kBytes, rows_up_to(kCount)) == newest);
  CHECK(volume->stats().cleaned_segments > 0 && volume->stats().moved_rows > 0);
  volume->checkpoint(++epoch);
  volume->close();
  const auto again = open_volume(options_for(medium, folder.stripes(2), capacity));
  CHECK(get_versions(*again, again->table({"t", kCount, kBytes}, {}), kBytes, rows_up_to(kCount)) == newest);
}

TEST_ON_EACH_MEDIUM("a volume that cleans while index snapshots are written goes back to what its checkpoint held") {
  Random random = fresh_random();
  const Folder folder;
  LogOptions options = options_for(medium, {folder.path()}, 24u << 20);
  options.snapshot_after_bytes = 1u << 20;
  const auto volume = open_volume(options);
  constexpr uint32_t kBytes = 60'000;
  constexpr int64_t kCount = 60;  // 3.6 MB of records: survivors, a few a segment, are soon overwritten
  const TableId table = volume->table({"t", kCount, kBytes}, {});
  std::vector<uint64_t> newest(kCount, 0), committed;
  uint64_t epoch = 0, snapshots = 0;
  for (uint64_t version = 1; version <= 600 * rounds(); ++version) {
    if (version % 2 == 1 || volume->wants_checkpoint()) {
      volume->checkpoint(++epoch);
      committed = newest;
      snapshots += folder.holds("index_");
    }
    bool go_back = version % 40 == 0;
    std::vector<int64_t> rows(1 + below(random, 24));
    for (int64_t& r : rows) r = static_cast<int64_t>(below(random, kCount));
    try {
      put_versions(*volume, table, kBytes, rows, std::vector<uint64_t>(rows.size(), version));
      for (const int64_t r : rows) newest[r] = version;
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kVolumeFull) throw;
      go_back = true;
    }
    if (!go_back) continue;
    volume->restore(epoch);
    newest = committed;
    CHECK(get_versions(*volume, table, kBytes, rows_up_to(kCount)) == newest);
  }
  CHECK(volume->stats().moved_rows > 0);
  CHECK(snapshots > 0);
}

TEST("a volume that is full says so, and serves what it took") {
  const Folder folder;
  LogOptions options = options_for("pread", {folder.path()}, 4u << 20);
  constexpr uint32_t kBytes = 1000;
  uint64_t taken = 0;
  {
    const auto volume = open_volume(options);
    const TableId table = volume->table({"t", 10'000, kBytes}, {});
    const std::string message = check_error(ErrorKind::kVolumeFull, [&] {
      for (;; ++taken) put_versions(*volume, table, kBytes, {static_cast<int64_t>(taken)}, {taken + 1});
    });
    CHECK(message.find("capacity_bytes is 4194304") != std::string::npos);
    CHECK(taken > 1000);
    const std::vector<uint64_t> versions = get_versions(*volume, table, kBytes, rows_up_to(static_cast<int64_t>(taken) + 1));
    for (uint64_t i = 0; i < taken; ++i) CHECK_EQ(versions[i], i + 1);
    CHECK_EQ(versions[taken], 0u);
    volume->checkpoint(1);
    volume->close();
  }
  const auto again = open_volume(options);
  const TableId table = again->table({"t", 10'000, kBytes}, {});
  CHECK_EQ(get_versions(*again, table, kBytes, {static_cast<int64_t>(taken) - 1})[0], taken);
}

TEST_ON_EACH_MEDIUM("a volume that is full of what its checkpoint names takes puts again after the next ones") {
  Random random = fresh_random();
  const Folder folder;
  LogOptions options = options_for(medium, {folder.path()}, 16u << 20);
  options.keep_checkpoints = 1;
  const auto volume = open_volume(options);
  constexpr uint32_t kBytes = 2000;
  constexpr int64_t kCount = 2000;  // 4 MB of records
  const TableId table = volume->table({"t", kCount, kBytes}, {});
  std::vector<uint64_t> newest(kCount, 0);
  uint64_t epoch = 0;
  for (uint64_t version = 1; version <= 500; ++version) {
    std::vector<int64_t> rows(50);
    for (int64_t& r : rows) r = static_cast<int64_t>(below(random, kCount));
    for (int tries = 0;; ++tries) {
      try {
        put_versions(*volume, table, kBytes, rows, std::vector<uint64_t>(rows.size(), version));
        break;
      } catch (const Error& e) {  // in vain, again and again: something is retained for ever
        if (e.kind() != ErrorKind::kVolumeFull || tries == 20) throw;
        volume->checkpoint(++epoch);
      }
    }
    for (const int64_t r : rows) newest[r] = version;
    // Seldom enough that each segment holds some newest record; then for a while only when the volume is full.
    if (version % 200 < 100 && version % 20 == 0) volume->checkpoint(++epoch);
  }
  CHECK(get_versions(*volume, table, kBytes, rows_up_to(kCount)) == newest);
}

TEST("a volume refuses what it was not given, by kind") {
  const Folder folder;
  check_error(ErrorKind::kConfiguration, [] { LogVolume(options_for("pread", {}, 64u << 20)); });
  check_error(ErrorKind::kConfiguration, [&] { LogVolume(options_for("pread", {folder.path()}, 1)); });
  check_error(ErrorKind::kVolumeIo, [&] { LogVolume(options_for("pread", {folder.path() + "/none"}, 64u << 20)); });
  const auto volume = open_volume(options_for("pread", {folder.path()}, 64u << 20));
  check_error(ErrorKind::kVolumeLocked, [&] { LogVolume(options_for("pread", {folder.path()}, 64u << 20)); });
  const TableId table = volume->table({"t", 10, 64}, {});
  check_error(ErrorKind::kVolumeMismatch, [&] { volume->table({"t", 11, 64}, {}); });
  check_error(ErrorKind::kIdOutOfRange, [&] { put_versions(*volume, table, 64, {1, 10}, {1, 1}); });
  check_error(ErrorKind::kIdOutOfRange, [&] { get_versions(*volume, table, 64, {-1}); });
  CHECK_EQ(get_versions(*volume, table, 64, {1})[0], 0u);
  volume->checkpoint(3);
  check_error(ErrorKind::kVolume, [&] { volume->checkpoint(3); });
  check_error(ErrorKind::kVolume, [&] { volume->restore(2); });
  volume->close();
  volume->close();
  check_error(ErrorKind::kVolume, [&] { get_versions(*volume, table, 64, {1}); });
  check_error(ErrorKind::kVolume, [&] { put_versions(*volume, table, 64, {1}, {1}); });
}

}  // namespace
}  // namespace mtrains::test
