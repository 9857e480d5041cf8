#include "ssd_volume.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>


namespace mtrains {
namespace {

constexpr uint64_t kChunkBytes = 256u << 10;  // one write
constexpr size_t kMostChunks = 8;             // of a stream, in memory: full, being written or being filled
constexpr uint64_t kLeastSegmentBytes = 1u << 20, kMostSegmentBytes = 64u << 20;
constexpr uint64_t kReplayBytes = 1u << 20;

AlignedBytes aligned(size_t bytes) {
  void* p = std::aligned_alloc(kPageBytes, (bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
  if (!p) throw std::bad_alloc();
  return AlignedBytes(static_cast<std::byte*>(p));
}

uint64_t block_offset(uint32_t block_bytes, uint32_t block) { return kPageBytes + uint64_t{block} * block_bytes; }

bool same(const Initializer& a, const Initializer& b) {
  return a.zero == b.zero && (a.zero || (a.seed == b.seed && a.low == b.low && a.high == b.high && a.first_row == b.first_row &&
                                         a.first_column == b.first_column && a.columns == b.columns && a.type == b.type));
}

std::string text_of(int error) { return error == IoQueue::kShort ? "it ended early" : std::strerror(error); }

}  // namespace

// -- opening

SsdVolume::SsdVolume(SsdOptions options) : options_(std::move(options)) {
  if (options_.keep_checkpoints < 1) throw Error(ErrorKind::kConfiguration, "keep_checkpoints must be at least 1");
  if (options_.depth < 1 || options_.depth > 4096) {
    throw Error(ErrorKind::kConfiguration, "depth must be 1 to 4096, got " + std::to_string(options_.depth));
  }
  if (options_.capacity_bytes < 2 * kLeastSegmentBytes) {
    throw Error(ErrorKind::kConfiguration, "capacity_bytes must be at least " + std::to_string(2 * kLeastSegmentBytes) + ", got " +
                                               std::to_string(options_.capacity_bytes));
  }
  for (const std::string& path : options_.paths) folders_.emplace_back(path);
  segment_bytes_ = std::clamp(std::bit_floor(options_.capacity_bytes / 256), kLeastSegmentBytes, kMostSegmentBytes);
  open_newest();
  queue_ = std::make_unique<IoQueue>(options_.backend, options_.depth,
                                     [this](const IoJob& job, const std::byte* data, int error) { on_io(job, data, error); });
  cleaner_ = std::thread([this] { clean(); });
}

SsdVolume::~SsdVolume() {
  try {
    close();
  } catch (const Error&) {  // nothing more can be done with it
  }
  stop_cleaner();
}

void SsdVolume::open_newest() {
  const std::vector<uint64_t> epochs = folders_[0].manifests();
  folders_[0].remove_unfinished();
  if (epochs.empty()) {
    std::random_device random;
    for (uint8_t& byte : volume_) byte = static_cast<uint8_t>(random());
    for (VolumeFolder& f : folders_) {
      for (const uint32_t number : f.segments()) f.remove_segment(number);  // of a job that never committed
    }
    return;
  }
  Manifest newest;
  for (const uint64_t epoch : epochs) {
    const std::vector<std::byte> bytes = folders_[0].read_manifest(epoch);
    newest = Manifest::decode(bytes, folders_[0].manifest_file(epoch));
    if (newest.path_count != folders_.size()) {
      throw Error(ErrorKind::kVolumeMismatch, "volume " + name() + " was made over " + std::to_string(newest.path_count) +
                                                  " paths, opened with " + std::to_string(folders_.size()) +
                                                  ": name the same paths in the same order");
    }
    Kept kept{epoch, bytes.size(), {}};
    for (const ManifestSegment& s : newest.segments) kept.segments.push_back(s.number);
    kept_.push_back(std::move(kept));
  }
  load(newest);
}

void SsdVolume::load(const Manifest& manifest) {
  volume_ = manifest.volume;
  segment_bytes_ = manifest.segment_bytes;
  next_sequence_ = std::max(next_sequence_, manifest.next_sequence);
  for (size_t t = 0; t < manifest.tables.size(); ++t) {
    if (t == tables_.size()) add_table(manifest.tables[t].spec, manifest.tables[t].init);
  }
  std::set<uint32_t> wanted;
  for (const Kept& k : kept_) wanted.insert(k.segments.begin(), k.segments.end());
  std::map<uint32_t, uint32_t> path_of;
  for (uint32_t p = 0; p < folders_.size(); ++p) {
    for (const uint32_t number : folders_[p].segments()) {
      next_segment_ = std::max(next_segment_, number + 1);
      if (!wanted.contains(number)) folders_[p].remove_segment(number);
      path_of[number] = p;
    }
  }
  std::map<uint32_t, ManifestSegment> counted;
  for (const ManifestSegment& s : manifest.segments) counted[s.number] = s;
  std::vector<LazyArray<uint64_t>> sequences;
  for (const Table& t : tables_) sequences.emplace_back(static_cast<size_t>(t.spec.row_count));
  for (const uint32_t number : wanted) {
    const auto at = counted.find(number);
    const uint32_t path = at != counted.end() ? at->second.path_index : path_of.contains(number) ? path_of[number] : 0;
    auto segment = std::make_shared<Segment>();
    segment->number = number;
    segment->path = path;
    segment->file = folders_[path].open_segment(number);
    segments_[number] = segment;
    if (at == counted.end()) continue;  // an older checkpoint's alone
    segment->block_bytes = at->second.block_bytes;
    segment->capacity_blocks = static_cast<uint32_t>((segment_bytes_ - kPageBytes) / segment->block_bytes);
    segment->blocks = at->second.blocks;
    replay(*segment, sequences);
    Stream& stream = stream_of(segment->block_bytes, false);
    if (segment->blocks < segment->capacity_blocks) stream.current = segment;  // the newest of them goes on
  }
  for (Table& t : tables_) {
    for (size_t row = 0; row < t.index.size(); ++row) {
      if (t.index[row]) ++segments_.at(Place::unpack(t.index[row]).segment)->live;
    }
  }
  coming_ = 0;
  for (const Kept& k : kept_) keep(k);
}

void SsdVolume::replay(Segment& segment, std::vector<LazyArray<uint64_t>>& sequences) {
  const std::string file = folders_[segment.path].segment_file(segment.number);
  const uint64_t per_read = std::max<uint64_t>(kReplayBytes / segment.block_bytes, 1) * segment.block_bytes;
  const AlignedBytes buffer = aligned(per_read);
  auto read_whole = [&](uint64_t offset, uint64_t bytes) {
    const ssize_t n = pread(segment.file.fd(), buffer.get(), bytes, static_cast<off_t>(offset));
    if (n < 0) throw_io("read", file, errno);
    if (static_cast<uint64_t>(n) == bytes) return;
    throw Error(ErrorKind::kDamagedRecord, "segment " + file + " ends at byte " + std::to_string(offset + static_cast<uint64_t>(n)) +
                                               ", its checkpoint has more. Restore the volume from a copy");
  };
  read_whole(0, kPageBytes);
  SegmentHeader header;
  std::memcpy(&header, buffer.get(), sizeof header);
  if (header.magic != kSegmentMagic || header.crc != crc32c(0, &header, offsetof(SegmentHeader, crc)) ||
      header.volume != volume_ || header.segment != segment.number || header.block_bytes != segment.block_bytes) {
    throw Error(ErrorKind::kDamagedRecord, "segment " + file + " does not begin with the header of this volume's segment " +
                                               std::to_string(segment.number) + ". Restore the volume from a copy");
  }
  const auto blocks_per_read = static_cast<uint32_t>(per_read / segment.block_bytes);
  for (uint32_t first = 0; first < segment.blocks; first += blocks_per_read) {
    const uint32_t count = std::min(blocks_per_read, segment.blocks - first);
    read_whole(block_offset(segment.block_bytes, first), uint64_t{count} * segment.block_bytes);
    for (uint32_t b = 0; b < count; ++b) {
      segment.records += replay_block(segment, first + b, buffer.get() + uint64_t{b} * segment.block_bytes, sequences);
    }
  }
}

uint32_t SsdVolume::replay_block(const Segment& segment, uint32_t block, const std::byte* data,
                                 std::vector<LazyArray<uint64_t>>& sequences) {
  uint32_t records = 0;
  const std::string file = folders_[segment.path].segment_file(segment.number);
  const TableId number = header_of(data).table;
  auto fail = [&](const std::string& what) {
    throw Error(ErrorKind::kDamagedRecord, "volume " + name() + ": segment " + file + ", block " + std::to_string(block) + ": " +
                                               what + ". Restore the volume from a copy");
  };
  if (number == 0 || number > tables_.size()) fail("no record of a known table begins it (table " + std::to_string(number) + ")");
  Table& table = tables_[number - 1];
  if (table.shape.block_bytes != segment.block_bytes) fail("table '" + table.spec.name + "' has blocks of another size");
  for (uint32_t i = 0; i < table.shape.records; ++i) {
    const std::byte* record = data + uint64_t{i} * table.shape.stride_bytes;
    const RecordHeader h = header_of(record);
    if (h.table == 0) break;
    const Place place{segment.number, block, i};
    if (h.table != number || h.row < 0 || h.row >= table.spec.row_count ||
        h.crc != record_crc(record, table.spec.record_bytes, place.pack())) {
      fail("the record of table '" + table.spec.name + "', row " + std::to_string(h.row) + " fails its checksum");
    }
    uint64_t& newest = sequences[number - 1][static_cast<size_t>(h.row)];
    ++records;
    if (h.sequence < newest) continue;
    newest = h.sequence;
    table.index[static_cast<size_t>(h.row)] = place.pack();
  }
  return records;
}

SsdVolume::Stream& SsdVolume::stream_of(uint32_t block_bytes, bool survivors) {
  for (Stream& s : streams_) {
    if (s.block_bytes == block_bytes && s.survivors == survivors) return s;
  }
  Stream& s = streams_.emplace_back();
  s.block_bytes = block_bytes;
  s.survivors = survivors;
  s.chunk_blocks = static_cast<uint32_t>(std::max<uint64_t>(kChunkBytes / block_bytes, 1));
  return s;
}

SsdVolume::Table& SsdVolume::add_table(const TableSpec& spec, const Initializer& init) {
  const BlockShape shape = BlockShape::of(spec.record_bytes);
  if (block_offset(shape.block_bytes, 1) > segment_bytes_) {
    throw Error(ErrorKind::kConfiguration, "table '" + spec.name + "': a record of " + std::to_string(spec.record_bytes) +
                                               " bytes does not fit this volume's segments of " + std::to_string(segment_bytes_) +
                                               "; raise capacity_bytes of a new volume");
  }
  auto open = [&](bool survivors) {
    Stream& stream = stream_of(shape.block_bytes, survivors);
    ++stream.tables;
    OpenBlock block{&stream, survivors ? kOpen | kMoved : kOpen, aligned(shape.block_bytes), {}};
    block.rows.reserve(shape.records);
    return block;
  };
  return tables_.emplace_back(Table{static_cast<TableId>(tables_.size() + 1), spec, init, shape,
                                    LazyArray<uint64_t>(static_cast<size_t>(spec.row_count)), open(false), open(true)});
}

TableId SsdVolume::table(const TableSpec& spec, const Initializer& init) {
  std::lock_guard lock(mutex_);
  require_open(closed_, name());
  require_valid(spec);
  for (const Table& t : tables_) {
    if (t.spec.name != spec.name) continue;
    require_same_shape(t.spec, spec, name());
    if (!same(t.init, init)) {
      throw Error(ErrorKind::kVolumeMismatch, "volume " + name() + " holds table '" + spec.name +
                                                  "' with other initial values (seed, range or place in the table). Nothing was "
                                                  "changed. Use the seed and sharding that wrote it, or name another path");
    }
    return t.id - 1;
  }
  return add_table(spec, init).id - 1;
}

// -- room

void SsdVolume::require_usable() const {
  require_open(closed_, name());
  if (awaiting_restore_) {
    std::string epochs;
    for (const Kept& k : kept_) epochs += (epochs.empty() ? "" : ", ") + std::to_string(k.epoch);
    throw Error(ErrorKind::kVolumeMismatch, "volume " + name() + " holds the checkpoints (" + epochs + ") of an earlier job. "
                                                "Nothing was changed. Resume from one (load_checkpoint), or name another path");
  }
  if (!write_error_.empty()) {
    throw Error(ErrorKind::kVolumeIo, "volume " + name() + ": " + write_error_ + ". Everything up to the last checkpoint is intact; "
                                          "resume from it once the device works");
  }
}

uint64_t SsdVolume::manifest_bytes() const {
  uint64_t bytes = 128 + 16 * (segments_.size() + 1);
  for (const Table& t : tables_) bytes += 64 + t.spec.name.size();
  return bytes;
}

uint64_t SsdVolume::used_bytes() const {
  uint64_t bytes = segments_.size() * segment_bytes_;
  for (const Kept& k : kept_) bytes += k.bytes;
  return bytes;
}

void SsdVolume::refuse_full() const {
  uint64_t live = 0, records = 0;
  for (const auto& [number, s] : segments_) {
    live += s->live;
    records += s->records;
  }
  throw Error(ErrorKind::kVolumeFull,
              "volume " + name() + " is full: capacity_bytes is " + std::to_string(options_.capacity_bytes) + ", " +
                  std::to_string(used_bytes()) + " are used by " + std::to_string(segments_.size()) + " segments of " +
                  std::to_string(segment_bytes_) + " bytes; of their " + std::to_string(records) + " records " +
                  std::to_string(live) + " are the newest of their rows, and " + std::to_string(coming_) +
                  " segments are kept for checkpoints alone. Nothing was changed, and everything up to the last checkpoint is "
                  "intact. Raise capacity_bytes, commit a checkpoint more often, or keep fewer of them");
}

bool SsdVolume::fits(uint64_t more_segments) const {
  return used_bytes() + more_segments * segment_bytes_ + manifest_bytes() <= options_.capacity_bytes;
}

std::shared_ptr<SsdVolume::Segment> SsdVolume::make_segment(uint32_t block_bytes) {
  if (!fits(1)) refuse_full();
  if (next_segment_ >= kMostSegments) throw Error(ErrorKind::kVolumeFull, "volume " + name() + " has used up its segment numbers");
  auto segment = std::make_shared<Segment>();
  segment->number = next_segment_;
  segment->path = next_segment_ % static_cast<uint32_t>(folders_.size());
  segment->block_bytes = block_bytes;
  segment->capacity_blocks = static_cast<uint32_t>((segment_bytes_ - kPageBytes) / block_bytes);
  segment->unsynced = true;
  segment->file = folders_[segment->path].create_segment(segment->number, segment_bytes_);
  SegmentHeader header{kSegmentMagic, kFormatVersion, segment->number, block_bytes, segment->path, volume_, 0};
  header.crc = crc32c(0, &header, offsetof(SegmentHeader, crc));
  const AlignedBytes page = aligned(kPageBytes);
  std::memset(page.get(), 0, kPageBytes);
  std::memcpy(page.get(), &header, sizeof header);
  if (pwrite(segment->file.fd(), page.get(), kPageBytes, 0) != static_cast<ssize_t>(kPageBytes)) {
    const int error = errno;
    folders_[segment->path].remove_segment(segment->number);
    throw_io("write", folders_[segment->path].segment_file(segment->number), error);
  }
  ++next_segment_;
  segments_[segment->number] = segment;
  return segment;
}

uint64_t SsdVolume::room_of(const Stream& stream) {
  uint64_t room = stream.current ? stream.current->capacity_blocks - stream.current->blocks : 0;
  for (const auto& s : stream.ready) room += s->capacity_blocks;
  return room;
}

void SsdVolume::ensure_room(Table& table, size_t rows, Lock& lock) {
  Stream& stream = *table.fresh.stream;
  // Blocks that these rows fill, and one for every block that a flush would seal.
  const uint64_t needed = (table.fresh.rows.size() + rows) / table.shape.records + stream.tables;
  while (room_of(stream) < needed) {
    if (!fits(comfortable())) reclaim();
    if (!fits(comfortable())) {  // the cleaner first does what it can
      const uint64_t round = idle_rounds_;
      ++waiting_for_room_;
      asked_ = true;
      cleaner_wake_.notify_one();
      room_made_.wait(lock, [&] { return fits(comfortable()) || idle_rounds_ != round || !write_error_.empty(); });
      --waiting_for_room_;
      require_usable();
    }
    if (!fits(1 + reserve())) refuse_full();
    stream.ready.push_back(make_segment(stream.block_bytes));
  }
  if (cleaning_is_due()) cleaner_wake_.notify_one();
}

void SsdVolume::lose(uint64_t place) {
  Segment& segment = *segments_.at(Place::unpack(place).segment);
  if (--segment.live == 0 && segment.kept > 0) ++coming_;
}

void SsdVolume::keep(const Kept& kept) {
  for (const uint32_t number : kept.segments) {
    Segment& segment = *segments_.at(number);
    if (segment.kept++ == 0 && segment.live == 0) ++coming_;
  }
}

void SsdVolume::let_go(const Kept& kept) {
  for (const uint32_t number : kept.segments) {
    Segment& segment = *segments_.at(number);
    if (--segment.kept == 0 && segment.live == 0) --coming_;
  }
}

std::set<uint32_t> SsdVolume::filling() const {
  std::set<uint32_t> numbers;
  for (const Stream& s : streams_) {
    if (s.current) numbers.insert(s.current->number);
    for (const auto& r : s.ready) numbers.insert(r->number);
  }
  return numbers;
}

void SsdVolume::reclaim() {
  const std::set<uint32_t> busy = filling();
  std::vector<uint32_t> dead;
  for (const auto& [number, s] : segments_) {
    if (s->live == 0 && s->kept == 0 && s->chunks.empty() && !busy.contains(number)) dead.push_back(number);
  }
  for (const uint32_t number : dead) remove_segment(number);
}

void SsdVolume::remove_segment(uint32_t number) {
  const auto at = segments_.find(number);
  folders_[at->second->path].remove_segment(number);
  std::lock_guard lock(batch_mutex_);
  std::erase_if(graves_, [&](const Grave& g) { return batches_.empty() || batches_.begin()->first > g.last_batch; });
  if (!batches_.empty()) graves_.push_back({at->second, last_batch_});
  segments_.erase(at);
}

// -- writing

void SsdVolume::put(TableId id, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts) {
  Lock lock(mutex_);
  require_usable();
  Table& table = tables_.at(id);
  require_rows(table.spec, rows);
  ensure_room(table, rows.size(), lock);
  for (size_t i = 0; i < rows.size(); ++i) {
    gather_record(parts, slots[i], append(table, table.fresh, rows[i], next_sequence_++, lock));
  }
  stats_.put_rows += rows.size();
}

void SsdVolume::give_up(TableId id, std::span<const int64_t> rows) {
  Lock lock(mutex_);
  if (closed_ || !write_error_.empty()) return;
  Table& table = tables_.at(id);
  for (const int64_t row : rows) {
    uint64_t& entry = table.index[static_cast<size_t>(row)];
    if (entry == 0 || (entry & kOpen)) continue;  // on no disk: nothing to save
    lose(entry);
    entry = kGivenUp;
    ++given_up_;
  }
}

std::byte* SsdVolume::append(Table& table, OpenBlock& open, int64_t row, uint64_t sequence, Lock& lock) {
  uint64_t& entry = table.index[static_cast<size_t>(row)];
  const RecordHeader header{0, table.id, row, sequence};
  for (;;) {  // seal may wait, and another thread may put meanwhile
    if (entry != kGivenUp && (entry & kOpen)) {
      std::byte* record = table.open_record(entry);
      std::memcpy(record, &header, sizeof header);
      return record + kRecordHeaderBytes;
    }
    if (open.rows.size() < table.shape.records) break;
    seal(table, open, lock);
  }
  if (entry && !(open.flag & kMoved)) replaced_bytes_ += table.shape.block_bytes / table.shape.records;
  if (entry == kGivenUp) {
    --given_up_;
  } else if (entry) {
    lose(entry);
  }
  entry = open.flag | open.rows.size();
  std::byte* record = table.open_record(entry);
  std::memcpy(record, &header, sizeof header);
  const size_t used = kRecordHeaderBytes + table.spec.record_bytes;
  std::memset(record + used, 0, table.shape.stride_bytes - used);
  open.rows.push_back(row);
  return record + kRecordHeaderBytes;
}

void SsdVolume::seal(Table& table, OpenBlock& open, Lock& lock) {
  if (open.rows.empty()) return;
  Stream& stream = *open.stream;
  Chunk* chunk = take_chunk(stream, lock);
  if (open.rows.empty()) return;  // another thread sealed it while this one waited
  Segment& segment = *chunk->segment;
  const uint32_t block = segment.blocks++;
  for (uint32_t i = 0; i < open.rows.size(); ++i) {
    std::byte* record = open.bytes.get() + uint64_t{i} * table.shape.stride_bytes;
    const uint64_t place = Place{segment.number, block, i}.pack();
    const uint32_t crc = record_crc(record, table.spec.record_bytes, place);
    std::memcpy(record, &crc, sizeof crc);
    table.index[static_cast<size_t>(open.rows[i])] = place;
  }
  if (segment.live == 0 && segment.kept > 0) --coming_;
  segment.live += open.rows.size();
  segment.records += static_cast<uint32_t>(open.rows.size());
  segment.unsynced = true;
  std::byte* to = chunk->buffer.get() + uint64_t{chunk->blocks++} * stream.block_bytes;
  const size_t used = open.rows.size() * table.shape.stride_bytes;
  std::memcpy(to, open.bytes.get(), used);
  std::memset(to + used, 0, stream.block_bytes - used);
  open.rows.clear();
  if (chunk->blocks == stream.chunk_blocks || segment.blocks == segment.capacity_blocks) dispatch(stream);
}

SsdVolume::Chunk* SsdVolume::take_chunk(Stream& stream, Lock& lock) {
  if (stream.chunk) return stream.chunk;
  if (stream.spare.empty() && stream.chunks.size() < kMostChunks) {
    stream.chunks.push_back(std::make_unique<Chunk>());
    stream.chunks.back()->stream = &stream;
    stream.chunks.back()->buffer = aligned(uint64_t{stream.chunk_blocks} * stream.block_bytes);
    stream.spare.push_back(stream.chunks.back().get());
  }
  written_.wait(lock, [&] { return stream.chunk || !stream.spare.empty() || !write_error_.empty(); });
  if (stream.chunk) return stream.chunk;
  if (stream.spare.empty()) require_usable();
  if (!stream.current || stream.current->blocks == stream.current->capacity_blocks) {
    if (stream.ready.empty()) stream.ready.push_back(make_segment(stream.block_bytes));
    stream.current = stream.ready.front();
    stream.ready.pop_front();
  }
  Chunk* chunk = stream.spare.back();
  stream.spare.pop_back();
  chunk->segment = stream.current.get();
  chunk->first_block = stream.current->blocks;
  chunk->blocks = 0;
  chunk->writing = false;
  chunk->segment->chunks.push_back(chunk);
  return stream.chunk = chunk;
}

void SsdVolume::dispatch(Stream& stream) {
  Chunk* chunk = std::exchange(stream.chunk, nullptr);
  if (!chunk) return;
  chunk->writing = true;
  ++writing_;
  const uint32_t bytes = chunk->blocks * stream.block_bytes;
  ++stats_.write_ios;
  stats_.write_bytes += bytes;
  queue_->submit({{true, chunk->segment->file.fd(), bytes, block_offset(stream.block_bytes, chunk->first_block), chunk->buffer.get(), chunk, 0}});
}

void SsdVolume::on_written(Chunk& chunk, int error) {
  std::lock_guard lock(mutex_);
  --writing_;
  if (error != 0) {  // the chunk stays: its records are served from it
    if (write_error_.empty()) {
      write_error_ = "a write of " + folders_[chunk.segment->path].segment_file(chunk.segment->number) + " at block " +
                     std::to_string(chunk.first_block) + " failed (" + text_of(error) + ")";
    }
  } else {
    std::erase(chunk.segment->chunks, &chunk);
    chunk.stream->spare.push_back(&chunk);
  }
  written_.notify_all();
}

void SsdVolume::drain(Lock& lock) {
  for (Table& t : tables_) {
    seal(t, t.fresh, lock);
    seal(t, t.moved, lock);
  }
  for (Stream& s : streams_) dispatch(s);
  written_.wait(lock, [&] { return writing_ == 0; });
  require_usable();
}

void SsdVolume::flush() {
  Lock lock(mutex_);
  require_usable();
  drain(lock);
}

// -- cleaning

bool SsdVolume::cleaning_is_due() const {
  // What a kept manifest names comes back only when that manifest goes: with checkpoints, cleaning begins as many segments
  // earlier as puts replace until then, and what it has emptied already counts as room. Survivors do not count (the more were
  // cleaned, the more would have to be), nor do rows put for the first time.
  const uint64_t replaced = std::max(replaced_bytes_, replaced_before_) / segment_bytes_ + 1;
  const uint64_t until_then = kept_.empty() ? 0 : (options_.keep_checkpoints + 1) * replaced;
  const uint64_t wanted = 1 + reserve() + options_.capacity_bytes / segment_bytes_ / 128 + until_then;
  return !fits(wanted > coming_ ? wanted - coming_ : 0);
}

uint64_t SsdVolume::held_back() const {
  return 2 + reserve() + (replaced_before_ > replaced_bytes_ ? replaced_before_ - replaced_bytes_ : 0) / segment_bytes_;
}

uint64_t SsdVolume::comfortable() const { return 2 + reserve(); }

std::shared_ptr<SsdVolume::Segment> SsdVolume::victim() const {
  const std::set<uint32_t> busy = filling();
  // One that is held gives nothing back yet, and puts go on until it does.
  const bool roomy = fits(held_back());
  std::shared_ptr<Segment> best;
  double best_score = 0;
  for (const auto& [number, s] : segments_) {
    if (s->records == 0 || s->live == 0 || !s->chunks.empty() || busy.contains(number)) continue;
    if (s->kept > 0 && !roomy) continue;
    const double share = static_cast<double>(s->live) / s->records + (s->kept > 0 ? 0.1 : 0);  // to be copied
    if (share >= 0.95) continue;  // copying gains nothing
    // Room gained per record copied, times how long it has stayed: what an old segment still holds is not being replaced.
    const double score = (1 - share) / share * (next_segment_ - number);
    if (score > best_score) {
      best = s;
      best_score = score;
    }
  }
  return best;
}

void SsdVolume::clean() {
  auto due = [&] { return cleaning_is_due() || (waiting_for_room_ > 0 && !fits(comfortable())); };
  Lock lock(mutex_);
  while (!stop_cleaner_) {
    cleaner_wake_.wait(lock, [&] { return stop_cleaner_ || asked_ || due(); });
    asked_ = false;
    reclaim();
    const std::shared_ptr<Segment> segment = due() ? victim() : nullptr;
    bool moved = false;
    if (segment && !stop_cleaner_) {
      lock.unlock();
      moved = move_survivors(segment);
      lock.lock();
      stats_.cleaned_segments += moved;
      reclaim();
    }
    if (!moved) ++idle_rounds_;
    room_made_.notify_all();
    // Nothing to do until something changes: a checkpoint, or puts that make newest records old.
    if (!moved) cleaner_wake_.wait_for(lock, std::chrono::milliseconds(20), [&] { return stop_cleaner_ || asked_; });
  }
}

bool SsdVolume::move_survivors(const std::shared_ptr<Segment>& segment) {
  const auto per_read = static_cast<uint32_t>(std::max<uint64_t>(kReplayBytes / segment->block_bytes, 1));
  const AlignedBytes buffer = aligned(uint64_t{per_read} * segment->block_bytes);
  for (uint32_t first = 0; first < segment->blocks; first += per_read) {
    std::lock_guard commit(commit_mutex_);
    Lock lock(mutex_);
    const auto at = segments_.find(segment->number);
    if (stop_cleaner_ || at == segments_.end() || at->second != segment || !write_error_.empty()) return false;
    if (segment->live == 0) return true;
    lock.unlock();
    const uint32_t count = std::min(per_read, segment->blocks - first);
    const uint64_t bytes = uint64_t{count} * segment->block_bytes;
    const ssize_t n = pread(segment->file.fd(), buffer.get(), bytes, static_cast<off_t>(block_offset(segment->block_bytes, first)));
    lock.lock();
    if (n != static_cast<ssize_t>(bytes)) {
      write_error_ = "cleaning could not read " + folders_[segment->path].segment_file(segment->number) + " at block " +
                     std::to_string(first) + " (" + text_of(n < 0 ? errno : IoQueue::kShort) + ")";
      return false;
    }
    ++stats_.clean_read_ios;
    stats_.clean_read_bytes += bytes;
    try {
      for (uint32_t b = 0; b < count; ++b) {
        move_block(*segment, first + b, buffer.get() + uint64_t{b} * segment->block_bytes, lock);
      }
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kVolumeFull) write_error_ = e.what();
      return false;
    }
  }
  return true;
}

void SsdVolume::move_block(Segment& segment, uint32_t block, const std::byte* data, Lock& lock) {
  const TableId number = header_of(data).table;
  if (number == 0 || number > tables_.size()) {
    throw Error(ErrorKind::kDamagedRecord, "segment " + std::to_string(segment.number) + ", block " + std::to_string(block) +
                                               " holds no record of a known table");
  }
  Table& table = tables_[number - 1];
  Stream& stream = *table.moved.stream;
  while (room_of(stream) < 1 + stream.tables) stream.ready.push_back(make_segment(stream.block_bytes));
  for (uint32_t i = 0; i < table.shape.records; ++i) {
    const std::byte* record = data + uint64_t{i} * table.shape.stride_bytes;
    const RecordHeader h = header_of(record);
    if (h.table == 0) break;
    const Place place{segment.number, block, i};
    if (h.table != number || h.row < 0 || h.row >= table.spec.row_count) {
      throw Error(ErrorKind::kDamagedRecord, "damaged: " + describe(table, h.row, place));
    }
    if (table.moved.rows.size() == table.shape.records) seal(table, table.moved, lock);  // may let puts in, so before the look
    if (table.index[static_cast<size_t>(h.row)] != place.pack()) continue;  // no longer the newest
    if (h.crc != record_crc(record, table.spec.record_bytes, place.pack())) {
      throw Error(ErrorKind::kDamagedRecord, "damaged: " + describe(table, h.row, place) + " fails its checksum");
    }
    std::memcpy(append(table, table.moved, h.row, h.sequence, lock), record + kRecordHeaderBytes, table.spec.record_bytes);
    ++stats_.moved_rows;
  }
}

void SsdVolume::stop_cleaner() {
  {
    std::lock_guard lock(mutex_);
    stop_cleaner_ = true;
  }
  cleaner_wake_.notify_all();
  if (cleaner_.joinable()) cleaner_.join();
}

// -- reading

const std::byte* SsdVolume::in_memory(const Segment& segment, uint32_t block) const {
  for (const Chunk* c : segment.chunks) {
    if (block >= c->first_block && block < c->first_block + c->blocks) {
      return c->buffer.get() + uint64_t{block - c->first_block} * segment.block_bytes;
    }
  }
  return nullptr;
}

uint64_t SsdVolume::submit_get(std::vector<GetRequest> requests) {
  Lock lock(mutex_);
  require_open(closed_, name());
  if (awaiting_restore_) require_usable();
  for (const GetRequest& r : requests) require_rows(tables_.at(r.table).spec, r.rows);
  auto batch = std::make_unique<Batch>();
  batch->requests = std::move(requests);
  std::vector<std::byte> initial;
  for (uint32_t r = 0; r < batch->requests.size(); ++r) {
    const GetRequest& request = batch->requests[r];
    Table& table = tables_[request.table];
    batch->tables.push_back(&table);
    stats_.get_rows += request.rows.size();
    for (uint32_t i = 0; i < request.rows.size(); ++i) {
      const uint64_t entry = table.index[static_cast<size_t>(request.rows[i])];
      const std::byte* record = nullptr;
      if (entry == 0) {
        initial.resize(table.spec.record_bytes);
        table.init.fill(request.rows[i], initial.data(), table.spec.record_bytes);
        scatter_record(initial.data(), request.parts, request.slots[i]);
        ++stats_.get_rows_initial;
        continue;
      }
      if (entry == kGivenUp) {
        throw Error(ErrorKind::kVolume, "volume " + name() + ", table '" + table.spec.name + "', row " +
                                            std::to_string(request.rows[i]) + ": its newest value is in a slot pool that was not "
                                            "flushed. Read it there, or flush or close the pool first");
      }
      if (entry & kOpen) {
        record = table.open_record(entry);
      } else {
        const Place place = Place::unpack(entry);
        const Segment& segment = *segments_.at(place.segment);
        if (const std::byte* block = segment.chunks.empty() ? nullptr : in_memory(segment, place.block)) {
          record = block + uint64_t{place.position} * table.shape.stride_bytes;
        }
      }
      if (record) {
        scatter_record(record + kRecordHeaderBytes, request.parts, request.slots[i]);
        ++stats_.get_rows_buffered;
      } else {
        batch->items.push_back({entry, r, i});
      }
    }
  }
  if (batch->items.empty()) return 0;
  std::vector<IoJob> jobs;
  plan_reads(*batch, jobs);
  batch->left = jobs.size();
  uint64_t token;
  {
    std::lock_guard guard(batch_mutex_);
    token = ++last_batch_;
    batches_[token] = std::move(batch);
  }
  queue_->submit(std::move(jobs));
  return token;
}

void SsdVolume::plan_reads(Batch& batch, std::vector<IoJob>& jobs) {
  std::sort(batch.items.begin(), batch.items.end(), [](const auto& a, const auto& b) { return a.place < b.place; });
  constexpr uint64_t kInBlock = (uint64_t{1} << 15) - 1;
  for (uint32_t first = 0; first < batch.items.size();) {
    uint32_t end = first + 1;
    while (end < batch.items.size() && (batch.items[end].place | kInBlock) == (batch.items[first].place | kInBlock)) ++end;
    const Place from = Place::unpack(batch.items[first].place), to = Place::unpack(batch.items[end - 1].place);
    const BlockShape& shape = batch.tables[batch.items[first].request]->shape;
    const uint64_t begin = uint64_t{from.position} * shape.stride_bytes / kPageBytes * kPageBytes;
    const uint64_t stop = (uint64_t{to.position + 1} * shape.stride_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    const auto bytes = static_cast<uint32_t>(std::min<uint64_t>(stop, shape.block_bytes) - begin);
    const int fd = segments_.at(from.segment)->file.fd();
    jobs.push_back({false, fd, bytes, block_offset(shape.block_bytes, from.block) + begin, nullptr, &batch,
                    static_cast<uint32_t>(batch.reads.size())});
    batch.reads.push_back({first, end - first, static_cast<uint32_t>(begin)});
    ++stats_.read_ios;
    stats_.read_bytes += bytes;
    first = end;
  }
}

void SsdVolume::on_io(const IoJob& job, const std::byte* data, int error) {
  if (job.write) {
    on_written(*static_cast<Chunk*>(job.owner), error);
  } else {
    auto& batch = *static_cast<Batch*>(job.owner);
    on_read(batch, batch.reads[job.index], data, error);
  }
}

void SsdVolume::on_read(Batch& batch, const Batch::Read& read, const std::byte* data, int error) {
  for (uint32_t k = read.first_item; k < read.first_item + read.items; ++k) {
    const Batch::Item& item = batch.items[k];
    const GetRequest& request = batch.requests[item.request];
    const Table& table = *batch.tables[item.request];
    const int64_t row = request.rows[item.at];
    const Place place = Place::unpack(item.place);
    if (error != 0) {
      if (batch.error.empty()) {
        batch.error = "cannot read " + describe(table, row, place) + ": " + text_of(error);
        batch.error_kind = ErrorKind::kVolumeIo;
      }
      continue;
    }
    const std::byte* record = data + uint64_t{place.position} * table.shape.stride_bytes - read.skipped_bytes;
    const RecordHeader h = header_of(record);
    if (h.table != table.id || h.row != row || h.crc != record_crc(record, table.spec.record_bytes, item.place)) {
      if (batch.error.empty()) {
        batch.error = "damaged: " + describe(table, row, place) + " fails its checksum. Resume from a checkpoint on a sound device, "
                      "or restore the volume from a copy";
        batch.error_kind = ErrorKind::kDamagedRecord;
      }
      continue;
    }
    scatter_record(record + kRecordHeaderBytes, request.parts, request.slots[item.at]);
  }
  if (batch.left.fetch_sub(1) == 1) {
    std::lock_guard lock(batch_mutex_);
    batch_done_.notify_all();
  }
}

void SsdVolume::wait(uint64_t token) {
  if (token == 0) return;
  std::unique_ptr<Batch> batch;
  {
    Lock lock(batch_mutex_);
    const auto at = batches_.find(token);
    if (at == batches_.end()) throw Error(ErrorKind::kVolume, "read " + std::to_string(token) + " was waited for already");
    const auto start = std::chrono::steady_clock::now();
    batch_done_.wait(lock, [&] { return at->second->left == 0; });
    batch = std::move(at->second);
    batches_.erase(at);
    stats_.read_wait_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (!batch->error.empty()) throw Error(batch->error_kind, batch->error);
}

// -- checkpoints

void SsdVolume::checkpoint(uint64_t epoch) {
  std::lock_guard commit(commit_mutex_);
  Lock lock(mutex_);
  require_usable();
  if (!sync_error_.empty()) {
    throw Error(ErrorKind::kVolumeIo, "volume " + name() + " commits nothing any more: " + sync_error_ +
                                          ", so what is on disk is unknown. Resume from the last checkpoint");
  }
  std::vector<uint64_t> have;
  for (const Kept& k : kept_) have.push_back(k.epoch);
  require_newer(have, epoch, name());
  if (given_up_ > 0) {
    throw Error(ErrorKind::kVolume, "volume " + name() + ": the newest values of " + std::to_string(given_up_) +
                                        " rows are in slot pools. Nothing was committed. Flush the pools first");
  }
  drain(lock);
  Manifest manifest{volume_, epoch, next_sequence_, segment_bytes_, static_cast<uint32_t>(folders_.size()), {}, {}};
  for (const Table& t : tables_) manifest.tables.push_back({t.spec, t.init});
  Kept kept{epoch, 0, {}};
  std::vector<std::shared_ptr<Segment>> unsynced;
  for (const auto& [number, s] : segments_) {
    if (s->live == 0) continue;
    manifest.segments.push_back({number, s->path, s->block_bytes, s->blocks});
    kept.segments.push_back(number);
    if (s->unsynced) unsynced.push_back(s);
    s->unsynced = false;
  }
  kept_.push_back(kept);  // from here on its segments stay
  keep(kept);
  lock.unlock();
  try {
    for (const auto& s : unsynced) sync_file(s->file.fd(), folders_[s->path].segment_file(s->number));
    for (const VolumeFolder& f : folders_) f.sync();
    const std::vector<std::byte> bytes = manifest.encode();
    folders_[0].commit_manifest(epoch, bytes);
    lock.lock();
    kept_.back().bytes = bytes.size();
  } catch (const Error& e) {
    lock.lock();
    let_go(kept_.back());
    kept_.pop_back();
    if (e.kind() != ErrorKind::kVolumeFull) sync_error_ = e.what();
    for (const auto& s : unsynced) s->unsynced = true;
    throw;
  }
  ++stats_.checkpoints;
  replaced_before_ = std::exchange(replaced_bytes_, 0);
  while (kept_.size() > options_.keep_checkpoints) {
    folders_[0].remove_manifest(kept_.front().epoch);
    let_go(kept_.front());
    kept_.erase(kept_.begin());
  }
  folders_[0].sync();
  reclaim();
  room_made_.notify_all();
}

std::vector<uint64_t> SsdVolume::epochs() const {
  std::lock_guard lock(mutex_);
  std::vector<uint64_t> result;
  for (const Kept& k : kept_) result.push_back(k.epoch);
  return result;
}

void SsdVolume::await_restore() {
  std::lock_guard lock(mutex_);
  awaiting_restore_ = true;
}

void SsdVolume::restore(uint64_t epoch) {
  std::lock_guard commit(commit_mutex_);
  Lock lock(mutex_);
  require_open(closed_, name());
  const auto at = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& k) { return k.epoch == epoch; });
  if (at == kept_.end()) {
    std::string epochs;
    for (const Kept& k : kept_) epochs += " " + std::to_string(k.epoch);
    throw Error(ErrorKind::kVolume, "volume " + name() + " does not keep epoch " + std::to_string(epoch) + "; it keeps" +
                                        (epochs.empty() ? " none" : epochs));
  }
  {
    std::lock_guard guard(batch_mutex_);
    if (!batches_.empty()) throw Error(ErrorKind::kVolume, "volume " + name() + ": reads are in flight; wait for them before restore");
  }
  written_.wait(lock, [&] { return writing_ == 0; });
  const Manifest manifest = Manifest::decode(folders_[0].read_manifest(epoch), folders_[0].manifest_file(epoch));
  while (kept_.back().epoch != epoch) {
    folders_[0].remove_manifest(kept_.back().epoch);
    kept_.pop_back();
  }
  folders_[0].sync();
  for (Table& t : tables_) {
    t.index.clear();
    t.fresh.rows.clear();
    t.moved.rows.clear();
  }
  for (Stream& s : streams_) {
    s.current.reset();
    s.ready.clear();
    s.chunk = nullptr;
    s.spare.clear();
    for (const auto& c : s.chunks) s.spare.push_back(c.get());
  }
  segments_.clear();
  graves_.clear();
  given_up_ = 0;
  write_error_.clear();
  load(manifest);
  awaiting_restore_ = false;
}

// -- looking in, closing

VolumeStats SsdVolume::stats() const {
  std::lock_guard lock(mutex_);
  std::lock_guard guard(batch_mutex_);
  VolumeStats s = stats_;
  s.disk_bytes = used_bytes();
  return s;
}

bool SsdVolume::direct() const {
  return std::all_of(folders_.begin(), folders_.end(), [](const VolumeFolder& f) { return f.direct(); });
}

std::string SsdVolume::id() const {
  std::string text;
  for (const uint8_t byte : volume_) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

std::string SsdVolume::name() const {
  std::string text;
  for (const std::string& p : options_.paths) text += (text.empty() ? "'" : ", '") + p + "'";
  return text;
}

std::string SsdVolume::describe(const Table& table, int64_t row, Place place) const {
  return "volume " + name() + ", segment " + std::to_string(place.segment) + ", block " + std::to_string(place.block) +
         ", record " + std::to_string(place.position) + ", table '" + table.spec.name + "', row " + std::to_string(row);
}

bool SsdVolume::wants_checkpoint() const {
  std::lock_guard lock(mutex_);
  return !kept_.empty() && !fits(2 + reserve() + options_.capacity_bytes / segment_bytes_ / 16);
}

void SsdVolume::close() {
  stop_cleaner();
  std::lock_guard commit(commit_mutex_);
  Lock lock(mutex_);
  if (closed_) return;
  closed_ = true;
  written_.wait(lock, [&] { return writing_ == 0; });
  {
    Lock guard(batch_mutex_);
    batch_done_.wait(guard, [&] {
      return std::all_of(batches_.begin(), batches_.end(), [](const auto& b) { return b.second->left == 0; });
    });
  }
  for (const auto& [number, s] : segments_) {
    if (s->kept == 0) folders_[s->path].remove_segment(number);
  }
  segments_.clear();
  for (Stream& s : streams_) {
    s.current.reset();
    s.ready.clear();
  }
  folders_.clear();
}

}  // namespace mtrains
