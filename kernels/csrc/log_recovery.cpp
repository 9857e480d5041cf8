// LogVolume: recovery: opening what is on disk, replay, and going back to a kept epoch.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <random>

#include "index_snapshot.h"
#include "log_volume.h"

namespace mtrains {
namespace {

constexpr uint64_t kReplayBytes = 1u << 20;  // read at a time
constexpr int kReaderTries = 5;              // a writer may remove what a reader has just read of

}  // namespace

// -- opening

void LogVolume::open_existing() {
  for (int tries = 1;; ++tries) {
    try {
      open_folders();
      return;
    } catch (const Error& e) {
      if (!options_.read_only || tries == kReaderTries || e.kind() == ErrorKind::kVolumeMismatch) throw;
      kept_.clear();
      segments_.clear();
    }
  }
}

void LogVolume::open_folders() {
  const std::vector<uint64_t> epochs = folders_[0].manifests();
  if (!options_.read_only) folders_[0].remove_unfinished();
  if (epochs.empty()) {
    if (options_.read_only) throw Error(ErrorKind::kVolumeMismatch, "path " + name_ + " holds no committed volume to read");
    std::random_device random;
    for (uint8_t& byte : volume_) byte = static_cast<uint8_t>(random());
    for (const VolumeFolder& f : folders_) {
      for (const uint32_t number : f.segments()) f.remove_segment(number);  // of a job that never committed
      for (const uint64_t epoch : f.snapshots()) f.remove_snapshot(epoch);
    }
    return;
  }
  std::optional<Manifest> chosen;
  for (const uint64_t epoch : epochs) {
    if (options_.read_only && epoch != options_.epoch.value_or(epochs.back())) continue;
    const std::vector<std::byte> bytes = folders_[0].read_manifest(epoch);
    const Manifest& manifest = chosen.emplace(Manifest::decode(bytes, folders_[0].manifest_file(epoch)));
    if (manifest.epoch != epoch) {
      throw Error(ErrorKind::kDamagedRecord, "manifest " + folders_[0].manifest_file(epoch) + " is that of epoch " +
                                                 std::to_string(manifest.epoch) + ". Give it back its name");
    }
    if (manifest.path_count != folders_.size()) {
      throw Error(ErrorKind::kVolumeMismatch, "volume " + name_ + " was made over " + std::to_string(manifest.path_count) +
                                                  " paths, opened with " + std::to_string(folders_.size()) +
                                                  ": name the same paths in the same order");
    }
    std::error_code missing;  // said when it is loaded
    const uint64_t snapshot_bytes =
        manifest.snapshot ? std::filesystem::file_size(folders_[0].snapshot_file(manifest.snapshot), missing) : 0;
    kept_.push_back({epoch, bytes.size(), manifest.snapshot, missing ? 0 : snapshot_bytes, manifest.segments});
  }
  if (!chosen) {
    throw Error(ErrorKind::kVolumeMismatch, "volume " + name_ + " keeps no epoch " + std::to_string(*options_.epoch) +
                                                "; the newest is " + std::to_string(epochs.back()));
  }
  load(*chosen);
  if (!options_.read_only) remove_unnamed();
}

void LogVolume::load(const Manifest& manifest) {
  volume_ = manifest.volume;
  segment_bytes_ = manifest.segment_bytes;
  next_sequence_ = std::max(next_sequence_, manifest.next_sequence);
  for (size_t t = 0; t < manifest.tables.size(); ++t) {
    const ManifestTable& table = manifest.tables[t];
    if (t == tables_.size()) add_table(table.spec, table.init);
    require_same_shape({tables_[t].spec.name, table.spec.row_count, tables_[t].spec.record_bytes}, table.spec, name_);
  }
  for (const Kept& k : kept_) {
    for (const ManifestSegment& s : k.segments) {
      const auto at = segments_.find(s.number);
      const auto segment = at != segments_.end() ? at->second : std::make_shared<LogSegment>();
      if (at == segments_.end()) {
        segment->number = s.number;
        segment->path = s.path_index;
        segment->block_bytes = s.block_bytes;
        segment->capacity_blocks = capacity_blocks(s.block_bytes);
        segment->file = folders_[s.path_index].open_segment(s.number);
        if (options_.mapped) {
          segment->mapping = Mapping(segment->file, folders_[s.path_index].segment_file(s.number), segment_bytes_, !options_.read_only);
        }
        segments_[s.number] = segment;
      }
      if (segment->path != s.path_index || segment->block_bytes != s.block_bytes) {
        throw Error(ErrorKind::kDamagedRecord, "volume " + name_ + ": its checkpoints disagree about segment " +
                                                   std::to_string(s.number) + ". Restore the volume from a copy");
      }
      require_bytes(segment->file, block_offset(s.block_bytes, s.blocks), folders_[s.path_index].segment_file(s.number));
    }
  }
  load_snapshot(manifest);
  std::vector<LazyArray<uint64_t>> sequences;
  for (const LogTable& t : tables_) sequences.emplace_back(static_cast<size_t>(t.spec.row_count));
  for (const ManifestSegment& s : manifest.segments) {
    replay(*segments_.at(s.number), s, sequences);
  }
  count_live();
  coming_ = 0;
  for (const Kept& k : kept_) keep(k);
}

void LogVolume::remove_unnamed() {
  for (const VolumeFolder& folder : folders_) {
    for (const uint32_t number : folder.segments()) {
      next_segment_ = std::max(next_segment_, number + 1);
      if (!segments_.contains(number)) folder.remove_segment(number);
    }
  }
  remove_unnamed_snapshots();
}

void LogVolume::load_snapshot(const Manifest& manifest) {
  named_.reset();
  if (manifest.snapshot == 0) return;
  const std::string file = folders_[0].snapshot_file(manifest.snapshot);
  auto snapshot = std::make_shared<Snapshot>();
  snapshot->epoch = manifest.snapshot;
  for (const ManifestSegment& s : manifest.segments) snapshot->covered[s.number] = {s.in_snapshot, s.records_in_snapshot};
  read_index_snapshot(folders_[0].open_snapshot(manifest.snapshot), file, volume_, manifest.snapshot,
                      [&](uint32_t number, uint64_t first_row, std::span<const uint64_t> places) {
                        if (number > tables_.size() || first_row + places.size() > tables_[number - 1].index.size()) {
                          throw Error(ErrorKind::kDamagedRecord, "index " + file + " names rows that no table has");
                        }
                        std::copy(places.begin(), places.end(), tables_[number - 1].index.data() + first_row);
                        snapshot->bytes += places.size_bytes();
                      });
  named_ = std::move(snapshot);
}

void LogVolume::read_blocks(const LogSegment& segment, uint32_t first, uint32_t count, std::byte* to) const {
  const uint64_t offset = block_offset(segment.block_bytes, first), bytes = uint64_t{count} * segment.block_bytes;
  if (segment.mapping.data()) {
    std::memcpy(to, segment.mapping.data() + offset, bytes);
  } else {
    read_whole(segment.file, to, bytes, offset, folders_[segment.path].segment_file(segment.number));
  }
}

void LogVolume::replay(LogSegment& segment, const ManifestSegment& named, std::vector<LazyArray<uint64_t>>& sequences) {
  segment.blocks = named.blocks;
  segment.records = named.records;
  const std::string file = folders_[segment.path].segment_file(segment.number);
  const AlignedBytes page = aligned_bytes(kPageBytes);
  read_whole(segment.file, page.get(), kPageBytes, 0, file);
  SegmentHeader header;
  std::memcpy(&header, page.get(), sizeof header);
  if (header.magic != kSegmentMagic || header.crc != crc32c(0, &header, offsetof(SegmentHeader, crc)) ||
      header.volume != volume_ || header.segment != segment.number || header.block_bytes != segment.block_bytes) {
    throw Error(ErrorKind::kDamagedRecord, "segment " + file + " does not begin with the header of this volume's segment " +
                                               std::to_string(segment.number) + ". Restore the volume from a copy");
  }
  const auto per_read = static_cast<uint32_t>(std::max<uint64_t>(kReplayBytes / segment.block_bytes, 1));
  const AlignedBytes buffer = aligned_bytes(uint64_t{per_read} * segment.block_bytes);
  uint32_t records = named.records_in_snapshot;
  for (uint32_t first = named.in_snapshot; first < segment.blocks; first += per_read) {
    const uint32_t count = std::min(per_read, segment.blocks - first);
    read_blocks(segment, first, count, buffer.get());
    for (uint32_t b = 0; b < count; ++b) {
      records += replay_block(segment, first + b, buffer.get() + uint64_t{b} * segment.block_bytes, sequences);
    }
  }
  if (records != named.records) {
    throw Error(ErrorKind::kDamagedRecord, "segment " + file + ": its checkpoint counts " + std::to_string(named.records) + " records in its " +
                                               std::to_string(named.blocks) + " blocks, there are " + std::to_string(records) +
                                               ": the end of a block was wiped. Restore the volume from a copy");
  }
}

uint32_t LogVolume::replay_block(const LogSegment& segment, uint32_t block, const std::byte* data,
                                 std::vector<LazyArray<uint64_t>>& sequences) {
  const TableId number = header_of(data).table;
  auto fail = [&](const std::string& what) {
    throw Error(ErrorKind::kDamagedRecord, "volume " + name_ + ": segment " + folders_[segment.path].segment_file(segment.number) +
                                               ", block " + std::to_string(block) + ": " + what + ". Restore the volume from a copy");
  };
  if (number == 0 || number > tables_.size()) fail("no record of a known table begins it (table " + std::to_string(number) + ")");
  LogTable& table = tables_[number - 1];
  if (table.shape.block_bytes != segment.block_bytes) fail("table '" + table.spec.name + "' has blocks of another size");
  uint32_t i = 0;
  for (; i < table.shape.records; ++i) {
    const std::byte* record = data + uint64_t{i} * table.shape.stride_bytes;
    const RecordHeader h = header_of(record);
    if (h.table == 0) {
      if (!is_zeros(record, data + segment.block_bytes)) fail("what follows its records is neither a record nor zeros");
      break;
    }
    const uint64_t place = Place{segment.number, block, i}.pack();
    if (h.table != number || h.row < 0 || h.row >= table.spec.row_count || !table.sound(h.row, place, record)) {
      fail("the record of table '" + table.spec.name + "', row " + std::to_string(h.row) + " fails its checksum");
    }
    // A survivor that cleaning moved keeps its sequence: it stands for what the snapshot says, unless a later put is here too.
    uint64_t& newest = sequences[number - 1][static_cast<size_t>(h.row)];
    if (h.sequence < newest) continue;
    newest = h.sequence;
    table.index[static_cast<size_t>(h.row)] = place;
  }
  return i;
}

void LogVolume::count_live() {
  live_bytes_ = 0;
  for (const LogTable& t : tables_) {
    for (size_t row = 0; row < t.index.size(); ++row) {
      if (!t.index[row]) continue;
      const Place place = Place::unpack(t.index[row]);
      const auto at = segments_.find(place.segment);
      if (at == segments_.end() || place.block >= at->second->blocks || place.position >= t.shape.records ||
          at->second->block_bytes != t.shape.block_bytes) {
        throw Error(ErrorKind::kDamagedRecord, "volume " + name_ + ": the index says that " + t.describe(name_, static_cast<int64_t>(row), place) +
                                                   " is where the checkpoint has no record. Restore the volume from a copy");
      }
      at->second->live_bytes += t.shape.share_bytes();
      live_bytes_ += t.shape.share_bytes();
    }
  }
}

// -- going back

void LogVolume::await_restore() {
  std::lock_guard lock(mutex_);
  awaiting_restore_ = true;
}

void LogVolume::restore(uint64_t epoch) {
  std::scoped_lock alone(commit_mutex_, moving_mutex_);
  Lock lock(mutex_);
  require_open(closed_, name_);
  require_writable();
  const auto at = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& k) { return k.epoch == epoch; });
  if (at == kept_.end()) {
    std::string epochs;
    for (const Kept& k : kept_) epochs.append(" ").append(std::to_string(k.epoch));
    throw Error(ErrorKind::kVolume, "volume " + name_ + " does not keep epoch " + std::to_string(epoch) + "; it keeps" +
                                        (epochs.empty() ? " none" : epochs));
  }
  stop_snapshot(lock);
  writer_.wait_for_writes(lock);
  if (!reader_.idle()) throw Error(ErrorKind::kVolume, "volume " + name_ + ": reads are in flight; wait for them before restore");
  const Manifest manifest = Manifest::decode(folders_[0].read_manifest(epoch), folders_[0].manifest_file(epoch));
  std::vector<uint64_t> on_disk = folders_[0].manifests();  // also one whose commit reported a failure
  restore_error_ = "its restore of epoch " + std::to_string(epoch) + " did not come to its end";
  std::vector<Kept> later(std::make_move_iterator(at + 1), std::make_move_iterator(kept_.end()));
  kept_.erase(at + 1, kept_.end());
  for (LogTable& t : tables_) {
    t.index.clear();
    t.fresh.rows.clear();
    t.moved.rows.clear();
  }
  writer_.reset();
  segments_.clear();
  reader_.bury({});  // closes what it kept open
  given_up_bytes_ = live_bytes_ = 0;
  replaced_bytes_ = step_put_bytes_ = step_bytes_ = steps_ = 0;
  wish_ = false;
  try {
    load(manifest);
    for (; !on_disk.empty() && on_disk.back() > epoch; on_disk.pop_back()) {
      folders_[0].remove_manifest(on_disk.back());
      if (!later.empty() && later.back().epoch == on_disk.back()) later.pop_back();
    }
    folders_[0].sync();
    remove_unnamed();
  } catch (const std::exception& e) {
    segments_.clear();  // what is half loaded must not be cleaned away
    kept_.insert(kept_.end(), std::make_move_iterator(later.begin()), std::make_move_iterator(later.end()));
    restore_error_ += ": " + std::string(e.what());
    throw;
  }
  restore_error_.clear();
  writer_.clear_error();
  awaiting_restore_ = false;
}

}  // namespace mtrains
