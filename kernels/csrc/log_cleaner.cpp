// LogVolume: room and cleaning.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <utility>

#include "log_volume.h"
#include "thread_name.h"
#include "trace.h"

namespace mtrains {
namespace {

constexpr uint64_t kCleanBytes = 1u << 20;  // read at a time; puts and gets go on in between

}  // namespace

uint64_t LogVolume::manifest_bytes() const {
  uint64_t bytes = 128 + kManifestSegmentBytes * (segments_.size() + 1);
  for (const LogTable& t : tables_) bytes += 64 + t.spec.name.size();
  return bytes;
}

uint64_t LogVolume::used_bytes() const {
  return (segments_.size() + removing_) * segment_bytes_ + used_beside_segments();
}

uint64_t LogVolume::used_beside_segments() const {
  uint64_t bytes = (named_ ? named_->bytes : 0) + (snapshot_ ? snapshot_->bytes : 0), counted = named_ ? named_->epoch : 0;
  for (auto k = kept_.rbegin(); k != kept_.rend(); ++k) {  // older ones name the same index snapshot or an older one
    bytes += k->bytes;
    if (k->snapshot != 0 && k->snapshot < counted) bytes += k->snapshot_bytes;
    if (k->snapshot != 0) counted = k->snapshot;
  }
  return bytes;
}

void LogVolume::refuse_full() const {
  throw Error(ErrorKind::kVolumeFull,
              "volume " + name_ + " is full: capacity_bytes is " + std::to_string(options_.capacity_bytes) + ", " +
                  std::to_string(used_bytes()) + " are used by " + std::to_string(segments_.size()) + " segments of " +
                  std::to_string(segment_bytes_) + " bytes: " + std::to_string(live_bytes_) + " bytes are newest rows, " +
                  std::to_string(coming_) +
                  " segments wait for a checkpoint to go. Nothing was lost, and everything up to the last checkpoint is "
                  "intact. Raise capacity_bytes (" + std::to_string(static_cast<uint64_t>(room().needed)) +
                  " are enough for these rows and steps, if every wish for a checkpoint is served), commit a checkpoint more often, "
                  "or keep fewer of them");
}

bool LogVolume::fits(uint64_t more_segments) const {
  return used_bytes() + more_segments * segment_bytes_ + manifest_bytes() <= options_.capacity_bytes;
}

std::shared_ptr<LogSegment> LogVolume::make_segment(uint32_t block_bytes) {
  if (!fits(1)) refuse_full();
  if (next_segment_ >= kMostSegments) throw Error(ErrorKind::kVolumeFull, "volume " + name_ + " has used up its segment numbers");
  auto segment = std::make_shared<LogSegment>();
  segment->number = next_segment_;
  segment->path = next_segment_ % static_cast<uint32_t>(folders_.size());
  segment->block_bytes = block_bytes;
  segment->capacity_blocks = capacity_blocks(block_bytes);
  segment->unsynced = true;
  segment->file = folders_[segment->path].create_segment(segment->number, segment_bytes_);
  SegmentHeader header{kSegmentMagic, kFormatVersion, segment->number, block_bytes, segment->path, volume_, 0};
  header.crc = crc32c(0, &header, offsetof(SegmentHeader, crc));
  const std::string file = folders_[segment->path].segment_file(segment->number);
  const AlignedBytes page = aligned_bytes(kPageBytes);
  std::memset(page.get(), 0, kPageBytes);
  std::memcpy(page.get(), &header, sizeof header);
  try {
    write_whole(segment->file, page.get(), kPageBytes, 0, file);
    if (options_.mapped) segment->mapping = Mapping(segment->file, file, segment_bytes_, true);
  } catch (const Error&) {
    folders_[segment->path].remove_segment(segment->number);
    throw;
  }
  ++next_segment_;
  segments_[segment->number] = segment;
  return segment;
}

uint64_t LogVolume::reserve() const {
  return static_cast<uint64_t>(std::count_if(writer_.streams().begin(), writer_.streams().end(), [&](const LogStream& s) {
    return s.survivors && 2 * s.room_blocks() * s.block_bytes < segment_bytes_;
  }));
}

uint64_t LogVolume::ensure_room(LogTable& table, size_t rows, Lock& lock) {
  LogStream& stream = *table.fresh.stream;
  // Blocks that these rows fill, that puts under way on other threads may fill, and one for every block that a flush would seal.
  const auto filled = [&] { return (table.fresh.rows.size() + rows) / table.shape.records; };  // other puts change it during a wait
  while (stream.room_blocks() < filled() + stream.promised_blocks + stream.tables) {
    if (!fits(comfortable())) reclaim(lock);
    wait_for_cleaner(waiting_puts_, lock);
    if (!fits(1 + reserve())) refuse_full();
    stream.ready.push_back(make_segment(stream.block_bytes));
  }
  if (cleaning_is_due()) cleaner_wake_.notify_one();
  return filled();
}

bool LogVolume::will_fit(uint64_t segments) const { return fits(segments > coming_ ? segments - coming_ : 0); }

// A put needs room now; a commit is what gives back what is held.
bool LogVolume::someone_waits() const {
  return (waiting_puts_ > 0 && !fits(comfortable())) || (waiting_commits_ > 0 && commit_should_wait());
}

void LogVolume::wait_for_cleaner(size_t& waiting, Lock& lock) {
  const uint64_t round = idle_rounds_;
  ++waiting;
  while (someone_waits() && idle_rounds_ == round && writer_.error().empty() && !stop_cleaner_) {
    asked_ = true;  // again after every look: room that was made may have been taken by another, while the cleaner slept
    cleaner_wake_.notify_one();
    room_made_.wait(lock);
  }
  --waiting;
  require_open(stop_cleaner_, name_);
  require_usable();
}

void LogVolume::lose(const LogTable& table, uint64_t place) {
  LogSegment& segment = *segments_.at(Place::unpack(place).segment);
  segment.live_bytes -= table.shape.share_bytes();
  live_bytes_ -= table.shape.share_bytes();
  if (segment.live_bytes == 0 && segment.kept > 0) ++coming_;
}

void LogVolume::keep(const Kept& kept) {
  for (const ManifestSegment& s : kept.segments) {
    LogSegment& segment = *segments_.at(s.number);
    if (segment.kept++ == 0 && segment.live_bytes == 0) ++coming_;
  }
}

void LogVolume::let_go(const Kept& kept) {
  for (const ManifestSegment& s : kept.segments) {
    LogSegment& segment = *segments_.at(s.number);
    if (--segment.kept == 0 && segment.live_bytes == 0) --coming_;
  }
}

// A file system may take long to remove files, while it commits its journal above all: others go on meanwhile. Removed segments
// count until they are gone.
void LogVolume::reclaim(Lock& lock) {
  const std::set<uint32_t> busy = writer_.filling();
  std::vector<std::shared_ptr<LogSegment>> dead;
  for (const auto& [number, s] : segments_) {
    if (s->live_bytes == 0 && s->kept == 0 && s->chunks.empty() && !busy.contains(number)) dead.push_back(s);
  }
  if (dead.empty()) return;
  const size_t count = dead.size();
  for (const auto& s : dead) segments_.erase(s->number);
  removing_ += count;
  std::vector<std::shared_ptr<LogSegment>> buried = reader_.bury(dead);  // what is closed last frees the space
  lock.unlock();
  for (const auto& s : dead) folders_[s->path].remove_segment(s->number);
  dead.clear();
  buried.clear();
  lock.lock();
  removing_ -= count;
  room_made_.notify_all();
}

LogVolume::Room LogVolume::room() const {
  const uint64_t beside = used_beside_segments() + manifest_bytes(), streams = writer_.streams().size();
  uint64_t payload = segment_bytes_ - kPageBytes, open_blocks = 0;
  for (const LogStream& s : writer_.streams()) {
    payload = std::min<uint64_t>(payload, uint64_t{s.block_bytes} * capacity_blocks(s.block_bytes));
    open_blocks += uint64_t{s.tables} * s.block_bytes;
  }
  Room room;
  room.segments = (options_.capacity_bytes - std::min(beside, options_.capacity_bytes)) / segment_bytes_;
  room.holding = segments_.size() + removing_ - coming_;
  const auto n = static_cast<double>(room.segments - std::min(streams, room.segments));
  const double live = std::min(static_cast<double>(live_bytes_ + given_up_bytes_) / static_cast<double>(payload), n);
  const double balance = std::sqrt(live * n);
  const double step = static_cast<double>(std::max(step_bytes_, step_bytes_before_) + open_blocks) / static_cast<double>(payload) +
                      static_cast<double>(streams) + 1;
  const double steps = (options_.keep_checkpoints + 1) * step / std::max(1 - std::sqrt(live / std::max(n, 1.0)), 1e-3);
  room.balance = static_cast<uint64_t>(std::ceil(balance)) + streams;
  room.needed = static_cast<double>(payload) * (std::sqrt(live) + std::sqrt((options_.keep_checkpoints + 1) * step)) *
                    (std::sqrt(live) + std::sqrt((options_.keep_checkpoints + 1) * step)) * segment_bytes_ / payload +
                static_cast<double>(streams * segment_bytes_ + beside);
  room.spare = static_cast<uint64_t>(std::min(std::max(steps, n / 16), n - balance));
  return room;
}

bool LogVolume::cleaning_is_due() const {
  // What a kept manifest names comes back only when that manifest goes: with checkpoints, cleaning begins as many segments
  // earlier as puts replace until then, and what it has emptied already counts as room. Survivors do not count (the more were
  // cleaned, the more would have to be), nor do rows put for the first time. It ends at the balance: beyond it costs more room than it gains.
  const uint64_t replaced = std::max(replaced_bytes_ + given_up_bytes_, replaced_before_) / segment_bytes_ + 1;
  const uint64_t until_then = kept_.empty() ? 0 : (options_.keep_checkpoints + 1) * replaced;
  if (will_fit(1 + reserve() + options_.capacity_bytes / segment_bytes_ / 128 + until_then)) return false;
  if (kept_.empty()) return true;
  const Room r = room();
  return r.holding > r.balance;
}

// What a commit names must leave as much room as the steps until its release can take.
bool LogVolume::commit_must_wait() const {
  const Room r = room();
  return r.holding + r.spare > r.segments && r.holding > r.balance;
}

// One that was wished for makes all the room that is cheap, so that the next wish is far.
bool LogVolume::commit_should_wait() const {
  const Room r = room();
  return r.holding > r.balance && (wish_ || r.holding + r.spare > r.segments);
}

bool LogVolume::wants_checkpoint() {
  std::lock_guard lock(mutex_);
  ++steps_;
  step_bytes_ = std::max(step_bytes_, std::exchange(step_put_bytes_, 0));
  if (wish_ || kept_.empty()) return wish_;
  // The commit begins with the pools' flush, which puts what they have taken.
  if (fits(2 + reserve() + given_up_bytes_ / segment_bytes_ + room().spare)) return false;
  return wish_ = coming_ > 0 || std::any_of(segments_.begin(), segments_.end(), [&](const auto& s) {
           return s.second->kept > 0 && s.second->live_bytes < segment_bytes_ / 4 * 3;
         });
}

uint64_t LogVolume::held_back() const {
  return 2 + reserve() + (replaced_before_ > replaced_bytes_ ? replaced_before_ - replaced_bytes_ : 0) / segment_bytes_;
}

uint64_t LogVolume::comfortable() const { return 2 + reserve(); }

std::shared_ptr<LogSegment> LogVolume::victim() const {
  const std::set<uint32_t> busy = writer_.filling();
  // One that is held gives nothing back until the last commit that names it goes, and puts go on until it does: they are left what
  // the commits before that one need. Before a commit that would leave too little the cleaner goes as far as leaves room for a put.
  // Where all is held and nothing is coming, one is emptied in any case, so that the next commit gives something back. Without
  // room for another segment too: the one that survivors go to may have some left.
  const uint64_t until_then = room().spare * options_.keep_checkpoints / (options_.keep_checkpoints + 1);
  const bool roomy = fits(std::max(waiting_commits_ > 0 ? 0 : held_back(), 2 + reserve() + until_then)) || coming_ == 0 ||
                     (waiting_commits_ > 0 && fits(2 + reserve()) && commit_must_wait());
  std::vector<std::shared_ptr<LogSegment>> able;
  uint64_t live = 0;
  for (const auto& [number, s] : segments_) {
    if (s->live_bytes == 0 || !s->chunks.empty() || busy.contains(number)) continue;
    able.push_back(s);
    live += s->live_bytes;
  }
  std::shared_ptr<LogSegment> best;
  double best_score = 0;
  for (const auto& s : able) {
    if (s->kept > 0 && !roomy) continue;
    if (!kept_.empty() && s->live_bytes > live / able.size()) continue;  // room that is held until a commit must be gained cheaply
    const auto payload = static_cast<double>(uint64_t{s->capacity_blocks} * s->block_bytes);
    const double share = static_cast<double>(s->live_bytes) / payload + (s->kept > 0 ? 0.1 : 0);  // to copy
    if (share >= 0.95) continue;  // copying gains nothing
    // Room gained per byte copied, times how long it has stayed: what an old segment still holds is not being replaced.
    const double score = (1 - share) / share * (next_segment_ - s->number);
    if (score > best_score) {
      best = s;
      best_score = score;
    }
  }
  return best;
}

void LogVolume::clean() {
  name_thread("mtrains-clean");
  auto due = [&] { return cleaning_is_due() || someone_waits(); };
  Lock lock(mutex_);
  while (!stop_cleaner_) {
    cleaner_wake_.wait(lock, [&] { return stop_cleaner_ || asked_ || due(); });
    asked_ = false;
    reclaim(lock);
    if (!due()) {
      room_made_.notify_all();
      continue;
    }
    const std::shared_ptr<LogSegment> segment = victim();
    bool moved = false;
    if (segment) {
      lock.unlock();
      moved = move_survivors(segment);
      lock.lock();
      stats_.cleaned_segments += moved;
      reclaim(lock);
    }
    if (!moved) ++idle_rounds_;
    room_made_.notify_all();
    // Nothing to do until something changes: a checkpoint, or puts that make newest records old.
    if (!moved) cleaner_wake_.wait_for(lock, std::chrono::milliseconds(20), [&] { return stop_cleaner_ || asked_; });
  }
}

bool LogVolume::move_survivors(const std::shared_ptr<LogSegment>& segment) {
  const TraceSpan span("clean");
  const auto per_read = static_cast<uint32_t>(std::max<uint64_t>(kCleanBytes / segment->block_bytes, 1));
  const AlignedBytes buffer = aligned_bytes(uint64_t{per_read} * segment->block_bytes);
  for (uint32_t first = 0; first < segment->blocks; first += per_read) {
    std::lock_guard moving(moving_mutex_);
    Lock lock(mutex_);
    const auto at = segments_.find(segment->number);
    if (stop_cleaner_ || !writer_.error().empty()) return false;
    if (at == segments_.end() || at->second != segment || segment->live_bytes == 0) return true;  // it emptied by itself
    lock.unlock();
    const uint32_t count = std::min(per_read, segment->blocks - first);
    std::string error;
    try {
      read_blocks(*segment, first, count, buffer.get());
    } catch (const Error& e) {
      error = e.what();
    }
    lock.lock();
    if (!error.empty()) {
      writer_.fail("cleaning failed: " + error);
      return false;
    }
    ++stats_.clean_read_ios;
    stats_.clean_read_bytes += uint64_t{count} * segment->block_bytes;
    try {
      for (uint32_t b = 0; b < count; ++b) {
        move_block(*segment, first + b, buffer.get() + uint64_t{b} * segment->block_bytes, lock);
      }
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kVolumeFull) writer_.fail(e.what());
      return false;
    }
  }
  return true;
}

void LogVolume::move_block(LogSegment& segment, uint32_t block, const std::byte* data, Lock& lock) {
  const TableId number = header_of(data).table;
  if (number == 0 || number > tables_.size()) {
    throw Error(ErrorKind::kDamagedRecord, "segment " + std::to_string(segment.number) + ", block " + std::to_string(block) +
                                               " holds no record of a known table");
  }
  LogTable& table = tables_[number - 1];
  LogStream& stream = *table.moved.stream;
  while (stream.room_blocks() < 1 + stream.tables) stream.ready.push_back(make_segment(stream.block_bytes));
  for (uint32_t i = 0; i < table.shape.records; ++i) {
    const std::byte* record = data + uint64_t{i} * table.shape.stride_bytes;
    const RecordHeader h = header_of(record);
    const Place place{segment.number, block, i};
    if (h.table == 0 && is_zeros(record, data + segment.block_bytes)) break;
    if (h.table != number || h.row < 0 || h.row >= table.spec.row_count) {
      throw Error(ErrorKind::kDamagedRecord, "damaged: " + table.describe(name_, h.row, place));
    }
    if (table.moved.rows.size() == table.shape.records) seal(table, table.moved, lock);  // may let puts in, so before the look
    if (table.index[static_cast<size_t>(h.row)] != place.pack()) continue;  // no longer the newest
    if (!table.sound(h.row, place.pack(), record)) throw Error(ErrorKind::kDamagedRecord, table.damage(name_, h.row, place));
    std::memcpy(append(table, table.moved, h.row, h.sequence, lock), record + kRecordHeaderBytes, table.spec.record_bytes);
    ++stats_.moved_rows;
  }
}

void LogVolume::stop_cleaner() {
  {
    std::lock_guard lock(mutex_);
    stop_cleaner_ = true;
  }
  cleaner_wake_.notify_all();
  room_made_.notify_all();
  if (cleaner_.joinable()) cleaner_.join();
}

}  // namespace mtrains
