// LogVolume: commits, index snapshots, and the epochs that are kept.
#include <algorithm>
#include <utility>

#include "index_snapshot.h"
#include "log_volume.h"
#include "thread_name.h"

namespace mtrains {
namespace {

constexpr uint64_t kPageEntries = 64u << 10;  // of an index snapshot

}  // namespace

// -- committing

void LogVolume::checkpoint(uint64_t epoch) {
  {
    Lock lock(mutex_);
    require_usable();
    if (!options_.read_only) wait_for_cleaner(waiting_commits_, lock);
  }
  std::lock_guard commit(commit_mutex_);
  Lock moving(moving_mutex_);
  Lock lock(mutex_);
  require_usable();
  require_writable();
  if (!sync_error_.empty()) {
    throw Error(ErrorKind::kVolumeIo, "volume " + name_ + " commits nothing any more: " + sync_error_ +
                                          ", so what is on disk is unknown. Resume from the last checkpoint");
  }
  std::vector<uint64_t> have;
  for (const Kept& k : kept_) have.push_back(k.epoch);
  require_newer(have, epoch, name_);
  drain_alone(lock);
  if (given_up_bytes_ > 0) {
    throw Error(ErrorKind::kVolume, "volume " + name_ + ": newest values, " + std::to_string(given_up_bytes_) +
                                        " bytes of records, are in slot pools. Nothing was committed. Flush the pools first");
  }
  Manifest manifest{volume_, epoch, next_sequence_, segment_bytes_, named_ ? named_->epoch : 0,
                    static_cast<uint32_t>(folders_.size()), {}, {}};
  for (const LogTable& t : tables_) manifest.tables.push_back({t.spec, t.init});
  std::vector<std::shared_ptr<LogSegment>> unsynced;
  for (const auto& [number, s] : segments_) {
    if (s->live_bytes == 0) continue;
    const auto covered = named_ && named_->covered.contains(number) ? named_->covered[number] : Snapshot::Covered{0, 0};
    manifest.segments.push_back({number, s->path, s->block_bytes, s->blocks, s->records, covered.blocks, covered.records});
    if (s->unsynced) unsynced.push_back(s);
    s->unsynced = false;
  }
  kept_.push_back({epoch, 0, manifest.snapshot, named_ ? named_->bytes : 0, manifest.segments});  // from here on its segments stay
  keep(kept_.back());
  const bool due = snapshot_is_due(manifest);
  if (due) begin_snapshot(manifest);
  lock.unlock();
  moving.unlock();
  try {
    for (const auto& s : unsynced) sync_file(s->file, folders_[s->path].segment_file(s->number));
    for (const VolumeFolder& f : folders_) f.sync();
    const std::vector<std::byte> bytes = manifest.encode();
    folders_[0].commit_manifest(epoch, bytes);
    lock.lock();
    kept_.back().bytes = bytes.size();
  } catch (const Error& e) {
    lock.lock();
    if (e.kind() == ErrorKind::kVolumeFull) {
      let_go(kept_.back());
    } else {  // its manifest may be on disk, so what it names stays
      sync_error_ = e.what();
    }
    kept_.pop_back();
    if (due) snapshot_.reset();
    for (const auto& s : unsynced) s->unsynced = true;
    throw;
  }
  ++stats_.checkpoints;
  replaced_before_ = std::exchange(replaced_bytes_, 0);
  // The pools' flush is as long as the interval was; it counts as a step's where the interval was one step.
  if (steps_ == 1) step_bytes_ += step_put_bytes_;
  step_bytes_before_ = std::exchange(step_bytes_, 0);
  step_put_bytes_ = steps_ = 0;
  wish_ = false;
  forget_manifests(lock);
  reclaim(lock);
  room_made_.notify_all();
  if (due) {
    if (snapshot_writer_.joinable()) snapshot_writer_.join();  // the one before has ended
    snapshot_writer_ = std::thread([this, snapshot = snapshot_] { write_snapshot(snapshot); });
  }
}

// What they name is given back only when it is certain that they are gone. Others go on meanwhile: commit_mutex_ holds kept_.
void LogVolume::forget_manifests(Lock& lock) {
  if (kept_.size() <= options_.keep_checkpoints) return;
  const auto end = kept_.end() - options_.keep_checkpoints;
  lock.unlock();
  std::string error;
  try {
    for (auto k = kept_.begin(); k != end; ++k) folders_[0].remove_manifest(k->epoch);
    folders_[0].sync();
  } catch (const Error& e) {
    error = e.what();
  }
  lock.lock();
  if (!error.empty()) {
    sync_error_ = error;
    throw Error(ErrorKind::kVolumeIo, error);
  }
  for (auto k = kept_.begin(); k != end; ++k) let_go(*k);
  kept_.erase(kept_.begin(), end);
  remove_unnamed_snapshots();
}

void LogVolume::remove_unnamed_snapshots() {
  for (const uint64_t epoch : folders_[0].snapshots()) {
    if ((named_ && named_->epoch == epoch) || (snapshot_ && snapshot_->epoch == epoch)) continue;
    if (std::none_of(kept_.begin(), kept_.end(), [&](const Kept& k) { return k.snapshot == epoch; })) folders_[0].remove_snapshot(epoch);
  }
}

bool LogVolume::snapshot_is_due(const Manifest& manifest) const {
  if (snapshot_) return false;
  uint64_t to_replay = 0, bytes = 0;
  for (const ManifestSegment& s : manifest.segments) to_replay += uint64_t{s.blocks - s.in_snapshot} * s.block_bytes;
  for (const LogTable& t : tables_) bytes += t.index.size() * sizeof(uint64_t);
  // Without room opening replays more, that is all. So at most two are on disk, and none makes the volume want a checkpoint.
  if (std::any_of(kept_.begin(), kept_.end(), [&](const Kept& k) { return k.snapshot != 0 && k.snapshot != manifest.snapshot; })) return false;
  return to_replay > options_.snapshot_after_bytes && fits(3 + reserve() + room().spare + bytes / segment_bytes_);
}

void LogVolume::begin_snapshot(const Manifest& manifest) {
  snapshot_ = std::make_shared<Snapshot>();
  snapshot_->epoch = manifest.epoch;
  // Those without a newest record too: puts may go on in them, and their old blocks must not be replayed over the snapshot.
  for (const auto& [number, segment] : segments_) snapshot_->covered[number] = {segment->blocks, segment->records};
  snapshot_->before.resize(tables_.size());
  for (const LogTable& t : tables_) snapshot_->bytes += t.index.size() * sizeof(uint64_t);
}

void LogVolume::write_snapshot(const std::shared_ptr<Snapshot>& shared) {
  name_thread("mtrains-index");
  Snapshot& snapshot = *shared;
  try {
    const std::string file = folders_[0].snapshot_file(snapshot.epoch);
    IndexSnapshotWriter writer(folders_[0].create_snapshot(snapshot.epoch), file, volume_, snapshot.epoch);
    std::vector<uint64_t> page;
    for (size_t t = 0; t < snapshot.before.size(); ++t) {
      for (uint64_t first = 0;;) {
        {
          Lock lock(mutex_);
          if (snapshot.cancelled) return;
          const LogTable& table = tables_[t];
          const uint64_t count = std::min<uint64_t>(kPageEntries, table.index.size() - first);
          page.assign(table.index.data() + first, table.index.data() + first + count);
          auto& before = snapshot.before[t];
          for (auto at = before.begin(); at != before.end() && at->first < first + count; at = before.erase(at)) {
            page[at->first - first] = at->second;
          }
          snapshot.table = t;
          snapshot.row = first + count;
        }
        if (std::any_of(page.begin(), page.end(), [](uint64_t p) { return p != 0; })) writer.page(static_cast<uint32_t>(t + 1), first, page);
        first += page.size();
        Lock lock(mutex_);
        if (first == tables_[t].index.size()) {
          snapshot.table = t + 1;
          snapshot.row = 0;
          break;
        }
      }
    }
    const uint64_t bytes = writer.finish();
    folders_[0].sync();
    Lock lock(mutex_);
    if (snapshot.cancelled) return;
    snapshot.bytes = bytes;
    named_ = std::move(snapshot_);
  } catch (const Error&) {  // without it opening replays more, that is all
    Lock lock(mutex_);
    if (!snapshot.cancelled) snapshot_.reset();
    folders_[0].remove_snapshot(snapshot.epoch);
  }
}

void LogVolume::stop_snapshot(Lock& lock) {
  if (!snapshot_) return;
  const std::shared_ptr<Snapshot> stopped = std::move(snapshot_);
  stopped->cancelled = true;
  lock.unlock();
  if (snapshot_writer_.joinable()) snapshot_writer_.join();
  lock.lock();
  folders_[0].remove_snapshot(stopped->epoch);
}

std::vector<uint64_t> LogVolume::epochs() const {
  std::lock_guard lock(mutex_);
  std::vector<uint64_t> result;
  for (const Kept& k : kept_) result.push_back(k.epoch);
  return result;
}

// -- going back

void LogVolume::withdraw(uint64_t epoch) {
  std::lock_guard commit(commit_mutex_);
  Lock lock(mutex_);
  require_open(closed_, name_);
  if (!restore_error_.empty()) require_loaded();
  require_writable();
  if (kept_.empty() || kept_.back().epoch != epoch) {
    throw Error(ErrorKind::kVolume, "volume " + name_ + ": only the newest epoch can be withdrawn, " + std::to_string(epoch) + " is not");
  }
  folders_[0].remove_manifest(epoch);
  folders_[0].sync();
  let_go(kept_.back());
  kept_.pop_back();
  remove_unnamed_snapshots();
}

}  // namespace mtrains
