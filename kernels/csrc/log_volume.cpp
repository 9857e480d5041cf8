#include "log_volume.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <random>

namespace mtrains {
namespace {

constexpr uint64_t kChunkBytes = 256u << 10;  // one write
constexpr uint32_t kEntriesAhead = 16;        // of the index, prefetched: each row is a miss of the processor's caches
constexpr size_t kMostChunks = 8;             // of a stream, in memory: full, being written or being filled

bool same(const Initializer& a, const Initializer& b) {
  return a.zero == b.zero && (a.zero || (a.seed == b.seed && a.low == b.low && a.high == b.high && a.first_row == b.first_row &&
                                         a.columns == b.columns && a.type == b.type));
}

std::string text_of(int error) { return error == IoQueue::kShort ? "it ended early" : std::strerror(error); }

}  // namespace

AlignedBytes aligned_bytes(size_t bytes) {
  void* p = std::aligned_alloc(kPageBytes, (bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
  if (!p) throw std::bad_alloc();
  return AlignedBytes(static_cast<std::byte*>(p));
}

// -- opening

LogVolume::LogVolume(LogOptions options)
    : options_(std::move(options)), system_(options_.system ? *options_.system : System::real()) {
  if (options_.paths.empty()) throw Error(ErrorKind::kConfiguration, "a volume needs at least one path, got none");
  if (options_.keep_checkpoints < 1) throw Error(ErrorKind::kConfiguration, "keep_checkpoints must be at least 1");
  if (options_.depth < 1 || options_.depth > 4096) {
    throw Error(ErrorKind::kConfiguration, "depth must be 1 to 4096, got " + std::to_string(options_.depth));
  }
  if (options_.capacity_bytes < 16 * kLeastSegmentBytes && !options_.read_only) {
    throw Error(ErrorKind::kConfiguration, "capacity_bytes must be at least " + std::to_string(16 * kLeastSegmentBytes) + ", got " +
                                               std::to_string(options_.capacity_bytes));
  }
  segment_bytes_ = std::clamp(std::bit_floor(options_.capacity_bytes / 256), kLeastSegmentBytes, kMostSegmentBytes);
  const auto access = options_.read_only ? VolumeFolder::Access::kRead
                      : options_.mapped  ? VolumeFolder::Access::kWriteMapped
                                         : VolumeFolder::Access::kWrite;
  for (const std::string& path : options_.paths) folders_.emplace_back(system_, path, access);
  open_existing();
  if (!options_.mapped) {
    const bool real = &system_ == &System::real();
    queue_ = std::make_unique<IoQueue>(system_, real ? options_.backend : "pread", options_.depth,
                                       [this](const IoJob& job, const std::byte* data, int error) { on_io(job, data, error); });
  }
  if (!options_.read_only) cleaner_ = std::thread([this] { clean(); });
}

LogVolume::~LogVolume() {
  try {
    close();
  } catch (const Error&) {  // nothing more can be done with it
  }
  stop_cleaner();
  if (snapshot_writer_.joinable()) snapshot_writer_.join();
}

LogVolume::Stream& LogVolume::stream_of(uint32_t block_bytes, bool survivors) {
  for (Stream& s : streams_) {
    if (s.block_bytes == block_bytes && s.survivors == survivors) return s;
  }
  Stream& s = streams_.emplace_back();
  s.block_bytes = block_bytes;
  s.survivors = survivors;
  s.chunk_blocks = static_cast<uint32_t>(std::max<uint64_t>(kChunkBytes / block_bytes, 1));
  return s;
}

LogVolume::Table& LogVolume::add_table(const TableSpec& spec, const Initializer& init) {
  const BlockShape shape = BlockShape::of(spec.record_bytes);
  if (segments_.empty() && kept_.empty()) {  // few blocks would leave much of a segment empty
    while (segment_bytes_ < block_offset(shape.block_bytes, 8) && segment_bytes_ < kMostSegmentBytes &&
           segment_bytes_ * 16 <= options_.capacity_bytes) {
      segment_bytes_ *= 2;
    }
  }
  if (block_offset(shape.block_bytes, 1) > segment_bytes_) {
    throw Error(ErrorKind::kConfiguration, "table '" + spec.name + "': a record of " + std::to_string(spec.record_bytes) +
                                               " bytes does not fit this volume's segments of " + std::to_string(segment_bytes_) +
                                               "; raise capacity_bytes of a new volume");
  }
  const bool known = std::any_of(streams_.begin(), streams_.end(), [&](const Stream& s) { return s.block_bytes == shape.block_bytes; });
  const uint64_t least = (streams_.size() + (known ? 1 : 3)) * segment_bytes_ + manifest_bytes();  // a segment a stream, one to turn over
  if (least > options_.capacity_bytes && !options_.read_only) {
    throw Error(ErrorKind::kConfiguration, "table '" + spec.name + "' does not fit: the tables of volume " + name() +
                                               " need capacity_bytes of at least " + std::to_string(least) + " before any row, got " +
                                               std::to_string(options_.capacity_bytes) + "; each size of block has two segments of " +
                                               std::to_string(segment_bytes_) + " bytes open. Nothing was changed");
  }
  auto open = [&](bool survivors) {
    Stream& stream = stream_of(shape.block_bytes, survivors);
    ++stream.tables;
    OpenBlock block{&stream, survivors ? kOpen | kMoved : kOpen, aligned_bytes(shape.block_bytes), {}};
    block.rows.reserve(shape.records);
    return block;
  };
  return tables_.emplace_back(Table{static_cast<TableId>(tables_.size() + 1), spec, init, shape,
                                    LazyArray<uint64_t>(static_cast<size_t>(spec.row_count)), open(false), open(true)});
}

TableId LogVolume::table(const TableSpec& spec, const Initializer& init) {
  std::lock_guard lock(mutex_);
  require_open(closed_, name());
  require_valid(spec);
  for (const Table& t : tables_) {
    if (t.spec.name != spec.name) continue;
    if (options_.read_only) return t.id - 1;  // as it was written
    require_same_shape(t.spec, spec, name());
    if (!same(t.init, init)) {
      throw Error(ErrorKind::kVolumeMismatch, "volume " + name() + " holds table '" + spec.name +
                                                  "' with other initial values (seed, range or place in the table). Nothing was "
                                                  "changed. Use the seed and sharding that wrote it, or name another path");
    }
    return t.id - 1;
  }
  if (options_.read_only) throw Error(ErrorKind::kVolumeMismatch, "volume " + name() + " holds no table '" + spec.name + "'");
  return add_table(spec, init).id - 1;
}

void LogVolume::grow(TableId id, int64_t row_count) {
  std::scoped_lock alone(commit_mutex_, moving_mutex_);  // a checkpoint may be about to start a snapshot of the old size
  Lock lock(mutex_);
  require_usable();
  require_writable();
  Table& table = tables_.at(id);
  TableSpec larger = table.spec;
  larger.row_count = row_count;
  require_valid(larger);
  if (row_count < table.spec.row_count) {
    throw Error(ErrorKind::kConfiguration, "table '" + table.spec.name + "' has " + std::to_string(table.spec.row_count) +
                                               " rows and cannot shrink to " + std::to_string(row_count));
  }
  stop_snapshot(lock);  // its pages are of the old size
  std::lock_guard guard(batch_mutex_);
  table.index.grow(static_cast<size_t>(row_count));
  table.spec.row_count = row_count;
}

// -- room

void LogVolume::require_writable() const {
  if (options_.read_only) throw Error(ErrorKind::kVolume, "volume " + name() + " is open for reading; nothing in it can change");
}

void LogVolume::require_loaded() const {
  require_open(closed_, name());
  if (!restore_error_.empty()) {
    throw Error(ErrorKind::kVolume, "volume " + name() + " holds nothing to serve: " + restore_error_ + ". Restore again, that epoch or "
                                        "another that it keeps, or close it");
  }
  if (awaiting_restore_) {
    std::string epochs;
    for (const Kept& k : kept_) epochs += (epochs.empty() ? "" : ", ") + std::to_string(k.epoch);
    throw Error(ErrorKind::kVolumeMismatch, "volume " + name() + " holds the checkpoints (" + epochs + ") of an earlier job. "
                                                "Nothing was changed. Resume from one (load_checkpoint), or name another path");
  }
}

void LogVolume::require_usable() const {
  require_loaded();
  if (!write_error_.empty()) {
    throw Error(ErrorKind::kVolumeIo, "volume " + name() + ": " + write_error_ + ". Everything up to the last checkpoint is intact; "
                                          "resume from it once the device works");
  }
}

// -- writing

void LogVolume::put(TableId id, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts) {
  Lock lock(mutex_);
  require_usable();
  require_writable();
  Table& table = tables_.at(id);
  require_rows(table.spec, rows);
  const size_t piece = size_t{capacity_blocks(table.shape.block_bytes)} * table.shape.records;
  for (size_t first = 0; first < rows.size(); first += piece) {
    const size_t count = std::min(piece, rows.size() - first);
    put_piece(table, rows.subspan(first, count), slots.subspan(first, count), parts, lock);
  }
}

void LogVolume::put_piece(Table& table, std::span<const int64_t> rows, std::span<const int32_t> slots, std::span<const Part> parts,
                          Lock& lock) {
  uint64_t blocks;
  do {
    written_.wait(lock, [&] { return checkpointing_ == 0; });
    require_usable();
    blocks = ensure_room(table, rows.size(), lock);  // may wait, and a checkpoint begin meanwhile
  } while (checkpointing_ > 0);
  table.fresh.stream->promised_blocks += blocks;
  const auto end = [blocks](Stream* stream) { stream->promised_blocks -= blocks; };
  const std::unique_ptr<Stream, decltype(end)> under_way(table.fresh.stream, end);
  for (size_t i = 0; i < rows.size(); ++i) {
    gather_record(parts, slots[i], append(table, table.fresh, rows[i], next_sequence_++, lock));
  }
  stats_.put_rows += rows.size();
  step_put_bytes_ += rows.size() * uint64_t{table.shape.share_bytes()};
}

uint64_t& LogVolume::entry_to_change(Table& table, int64_t row) {
  uint64_t& entry = table.index[static_cast<size_t>(row)];
  if (snapshot_) {  // what it has still to write is kept for it
    const size_t t = table.id - 1;
    const auto r = static_cast<uint64_t>(row);
    if (t < snapshot_->before.size() && (t > snapshot_->table || (t == snapshot_->table && r >= snapshot_->row))) {
      snapshot_->before[t].emplace(r, entry);
    }
  }
  return entry;
}

void LogVolume::give_up(Table& table, int64_t row, uint64_t place) {
  if (table.index[static_cast<size_t>(row)] != place) return;  // it has been put since
  lose(table, place);
  entry_to_change(table, row) = kGivenUp;
  given_up_bytes_ += table.shape.stride_bytes;
}

std::byte* LogVolume::append(Table& table, OpenBlock& open, int64_t row, uint64_t sequence, Lock& lock) {
  const RecordHeader header{0, table.id, row, sequence};
  for (;;) {  // seal may wait, and other threads put or grow the table meanwhile
    const uint64_t entry = table.index[static_cast<size_t>(row)];
    if (entry != kGivenUp && (entry & kOpen)) {
      std::byte* record = table.open_record(entry);
      std::memcpy(record, &header, sizeof header);
      return record + kRecordHeaderBytes;
    }
    if (open.rows.size() < table.shape.records) break;
    seal(table, open, lock);
  }
  uint64_t& entry = entry_to_change(table, row);
  if (entry && &open == &table.fresh) replaced_bytes_ += table.shape.stride_bytes;
  if (entry == kGivenUp) {
    given_up_bytes_ -= table.shape.stride_bytes;
  } else if (entry) {
    lose(table, entry);
  }
  entry = open.flag | open.rows.size();
  std::byte* record = table.open_record(entry);
  std::memcpy(record, &header, sizeof header);
  const size_t used = kRecordHeaderBytes + table.spec.record_bytes;
  std::memset(record + used, 0, table.shape.stride_bytes - used);
  open.rows.push_back(row);
  return record + kRecordHeaderBytes;
}

void LogVolume::seal(Table& table, OpenBlock& open, Lock& lock) {
  if (open.rows.empty()) return;
  Stream& stream = *open.stream;
  Chunk* chunk = options_.mapped ? nullptr : take_chunk(stream, lock);
  if (open.rows.empty()) return;  // another thread sealed it while this one waited
  if (options_.mapped) next_segment(stream);
  Segment& segment = *stream.current;
  const uint32_t block = segment.blocks++;
  for (uint32_t i = 0; i < open.rows.size(); ++i) {
    std::byte* record = open.bytes.get() + uint64_t{i} * table.shape.stride_bytes;
    const uint64_t place = Place{segment.number, block, i}.pack();
    const uint32_t crc = record_crc(record, table.spec.record_bytes, place);
    std::memcpy(record, &crc, sizeof crc);
    table.index[static_cast<size_t>(open.rows[i])] = place;
  }
  if (segment.live_bytes == 0 && segment.kept > 0) --coming_;
  const size_t used = open.rows.size() * table.shape.stride_bytes;
  segment.records += static_cast<uint32_t>(open.rows.size());
  segment.live_bytes += open.rows.size() * uint64_t{table.shape.share_bytes()};
  live_bytes_ += open.rows.size() * uint64_t{table.shape.share_bytes()};
  segment.unsynced = true;
  std::byte* to = chunk ? chunk->buffer.get() + uint64_t{chunk->blocks++} * stream.block_bytes
                        : segment.mapping.data() + block_offset(stream.block_bytes, block);
  std::memcpy(to, open.bytes.get(), used);
  std::memset(to + used, 0, stream.block_bytes - used);
  open.rows.clear();
  if (!chunk) {
    ++stats_.write_ios;
    stats_.write_bytes += stream.block_bytes;
  } else if (chunk->blocks == stream.chunk_blocks || segment.blocks == segment.capacity_blocks) {
    dispatch(stream);
  }
}

void LogVolume::next_segment(Stream& stream) {
  if (stream.current && stream.current->blocks < stream.current->capacity_blocks) return;
  if (stream.ready.empty()) stream.ready.push_back(make_segment(stream.block_bytes));
  stream.current = stream.ready.front();
  stream.ready.pop_front();
}

LogVolume::Chunk* LogVolume::take_chunk(Stream& stream, Lock& lock) {
  if (stream.chunk) return stream.chunk;
  if (stream.spare.empty() && stream.chunks.size() < kMostChunks) {
    stream.chunks.push_back(std::make_unique<Chunk>());
    stream.chunks.back()->stream = &stream;
    stream.chunks.back()->buffer = aligned_bytes(uint64_t{stream.chunk_blocks} * stream.block_bytes);
    stream.spare.push_back(stream.chunks.back().get());
  }
  written_.wait(lock, [&] { return stream.chunk || !stream.spare.empty() || !write_error_.empty() || closed_; });
  require_open(closed_, name());
  if (stream.chunk) return stream.chunk;
  if (stream.spare.empty()) require_usable();
  next_segment(stream);
  Chunk* chunk = stream.spare.back();
  stream.spare.pop_back();
  chunk->segment = stream.current.get();
  chunk->first_block = stream.current->blocks;
  chunk->blocks = 0;
  chunk->writing = false;
  chunk->segment->chunks.push_back(chunk);
  return stream.chunk = chunk;
}

void LogVolume::dispatch(Stream& stream) {
  Chunk* chunk = std::exchange(stream.chunk, nullptr);
  if (!chunk) return;
  chunk->writing = true;
  ++writing_;
  const uint32_t bytes = chunk->blocks * stream.block_bytes;
  ++stats_.write_ios;
  stats_.write_bytes += bytes;
  queue_->submit({{true, chunk->segment->file.fd(), bytes, block_offset(stream.block_bytes, chunk->first_block), chunk->buffer.get(), chunk, 0}});
}

void LogVolume::on_written(Chunk& chunk, int error) {
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

void LogVolume::drain(Lock& lock) {
  for (Table& t : tables_) {
    seal(t, t.fresh, lock);
    seal(t, t.moved, lock);
  }
  for (Stream& s : streams_) dispatch(s);
  written_.wait(lock, [&] { return writing_ == 0; });
  require_usable();
}

// What a checkpoint commits must be on disk at one moment: puts that begin wait, those that have begun end.
void LogVolume::drain_alone(Lock& lock) {
  ++checkpointing_;
  const auto over = [this](void*) {
    --checkpointing_;
    written_.notify_all();
  };
  const std::unique_ptr<void, decltype(over)> guard(this, over);
  const auto is_open = [](const Table& t) { return !t.fresh.rows.empty() || !t.moved.rows.empty(); };
  const auto is_filling = [](const Stream& s) { return s.chunk != nullptr; };
  do {
    drain(lock);
  } while (std::any_of(tables_.begin(), tables_.end(), is_open) || std::any_of(streams_.begin(), streams_.end(), is_filling) ||
           writing_ > 0);
}

void LogVolume::flush() {
  Lock lock(mutex_);
  require_usable();
  require_writable();
  drain(lock);
}

// -- reading

const std::byte* LogVolume::in_memory(const Segment& segment, uint32_t block) const {
  if (segment.mapping.data()) return segment.mapping.data() + block_offset(segment.block_bytes, block);
  for (const Chunk* c : segment.chunks) {
    if (block >= c->first_block && block < c->first_block + c->blocks) {
      return c->buffer.get() + uint64_t{block - c->first_block} * segment.block_bytes;
    }
  }
  return nullptr;
}

uint64_t LogVolume::submit_get(std::vector<GetRequest> requests, std::function<void()> ready) {
  Lock lock(mutex_);
  require_loaded();
  for (const GetRequest& r : requests) require_rows(tables_.at(r.table).spec, r.rows);
  auto batch = std::make_unique<Batch>();
  batch->requests = std::move(requests);
  std::vector<std::byte> initial;
  std::vector<Batch::Item> taken;
  for (uint32_t r = 0; r < batch->requests.size(); ++r) {
    const GetRequest& request = batch->requests[r];
    Table& table = tables_[request.table];
    batch->tables.push_back(&table);
    stats_.get_rows += request.rows.size();
    for (uint32_t i = 0; i < request.rows.size(); ++i) {
      if (i + kEntriesAhead < request.rows.size()) {
        __builtin_prefetch(&table.index[static_cast<size_t>(request.rows[i + kEntriesAhead])]);
      }
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
        if (const std::byte* block = in_memory(segment, place.block)) {
          record = block + uint64_t{place.position} * table.shape.stride_bytes;
          if (options_.mapped && !sound(table, request.rows[i], entry, record)) {
            batch->fail(ErrorKind::kDamagedRecord, damage(table, request.rows[i], place));
            continue;
          }
        }
      }
      if (record) {
        scatter_record(record + kRecordHeaderBytes, request.parts, request.slots[i]);
        if (options_.mapped && request.take && !(entry & kOpen)) taken.push_back({entry, r, i});
        ++(options_.mapped ? stats_.get_rows_mapped : stats_.get_rows_buffered);
      } else {
        batch->items.push_back({entry, r, i});
      }
    }
  }
  if (batch->error.empty()) {  // as in wait(): a batch that fails gives up nothing
    for (const Batch::Item& item : taken) give_up(*batch->tables[item.request], batch->requests[item.request].rows[item.at], item.place);
  }
  if (batch->items.empty() && batch->error.empty()) return 0;
  std::vector<IoJob> jobs;
  plan_reads(*batch, jobs);
  batch->left = jobs.size();
  if (!jobs.empty()) batch->ready = std::move(ready);
  uint64_t token;
  {
    std::lock_guard guard(batch_mutex_);
    token = ++last_batch_;
    batches_[token] = std::move(batch);
  }
  if (!jobs.empty()) queue_->submit(std::move(jobs));  // a mapped medium has no queue
  else if (ready) ready();
  return token;
}

void LogVolume::plan_reads(Batch& batch, std::vector<IoJob>& jobs) {
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

bool LogVolume::sound(const Table& table, int64_t row, uint64_t place, const std::byte* record) const {
  const RecordHeader h = header_of(record);
  return h.table == table.id && h.row == row && h.crc == record_crc(record, table.spec.record_bytes, place);
}

void LogVolume::on_io(const IoJob& job, const std::byte* data, int error) {
  if (job.write) {
    on_written(*static_cast<Chunk*>(job.owner), error);
  } else {
    auto& batch = *static_cast<Batch*>(job.owner);
    on_read(batch, batch.reads[job.index], data, job.bytes, error);
  }
}

void LogVolume::on_read(Batch& batch, const Batch::Read& read, const std::byte* data, uint32_t bytes, int error) {
  for (uint32_t k = read.first_item; k < read.first_item + read.items; ++k) {
    const Batch::Item& item = batch.items[k];
    const GetRequest& request = batch.requests[item.request];
    const Table& table = *batch.tables[item.request];
    const int64_t row = request.rows[item.at];
    const Place place = Place::unpack(item.place);
    if (error != 0) {
      batch.fail(ErrorKind::kVolumeIo, "cannot read " + describe(table, row, place) + ": " + text_of(error));
      continue;
    }
    const std::byte* record = data + uint64_t{place.position} * table.shape.stride_bytes - read.skipped_bytes;
    if (!sound(table, row, item.place, record)) {
      batch.fail(ErrorKind::kDamagedRecord, damage(table, row, place));
      continue;
    }
    scatter_record(record + kRecordHeaderBytes, request.parts, request.slots[item.at]);
  }
  if (error == 0) keep_wanted(batch, read, data, bytes);
  std::function<void()> ready;  // before the last read is counted: whoever waits takes the batch away then
  if (batch.left == 1) ready = std::move(batch.ready);
  if (batch.left.fetch_sub(1) == 1) {
    std::lock_guard lock(batch_mutex_);
    batch_done_.notify_all();
  }
  if (ready) ready();
}

// What came from the device, and most of the wanted bits, are in no cache: both are asked for some records ahead (guesses).
constexpr uint32_t kHeadersAhead = 8, kRowsAhead = 4;

void LogVolume::keep_wanted(Batch& batch, const Batch::Read& read, const std::byte* data, uint32_t bytes) const {
  const auto first = batch.items.begin() + read.first_item, last = first + read.items;
  const auto wants = std::find_if(first, last, [&](const Batch::Item& item) { return batch.requests[item.request].wanted; });
  if (wants == last) return;
  const RowSet& wanted = *batch.requests[wants->request].wanted;
  const Table& table = *batch.tables[wants->request];
  const BlockShape& shape = table.shape;
  Place place = Place::unpack(first->place);
  const uint32_t begin = (read.skipped_bytes + shape.stride_bytes - 1) / shape.stride_bytes;
  const uint32_t end = std::min(shape.records, (read.skipped_bytes + bytes) / shape.stride_bytes);
  const auto record_at = [&](uint32_t position) { return data + uint64_t{position} * shape.stride_bytes - read.skipped_bytes; };
  for (uint32_t ahead = begin; ahead < std::min(begin + kHeadersAhead, end); ++ahead) __builtin_prefetch(record_at(ahead));
  auto asked = first;
  for (place.position = begin; place.position < end; ++place.position) {
    if (place.position + kHeadersAhead < end) __builtin_prefetch(record_at(place.position + kHeadersAhead));
    if (place.position + kRowsAhead < end) wanted.prefetch(header_of(record_at(place.position + kRowsAhead)).row);
    const uint64_t packed = place.pack();
    while (asked != last && asked->place < packed) ++asked;
    if (asked != last && asked->place == packed) continue;
    const std::byte* const record = record_at(place.position);
    const int64_t row = header_of(record).row;
    if (!wanted.contains(row) || !sound(table, row, packed, record)) continue;
    Neighbours& found = batch.neighbours;
    found.rows.push_back({wants->request, shape.record_bytes, row, found.payloads.size()});
    found.payloads.insert(found.payloads.end(), record + kRecordHeaderBytes, record + kRecordHeaderBytes + shape.record_bytes);
    batch.neighbour_places.push_back(packed);
  }
}

Neighbours LogVolume::wait(uint64_t token) {
  if (token == 0) return {};
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
  finish(*batch);
  return std::move(batch->neighbours);
}

// Gives up what was taken, and leaves out neighbours that are no longer newest.
void LogVolume::finish(Batch& batch) {
  std::vector<Neighbour>& found = batch.neighbours.rows;
  if (found.empty() && std::none_of(batch.requests.begin(), batch.requests.end(), [](const GetRequest& r) { return r.take; })) return;
  Lock lock(mutex_);
  if (closed_ || !write_error_.empty()) {
    found.clear();
    return;
  }
  for (const Batch::Item& item : batch.items) {
    const GetRequest& request = batch.requests[item.request];
    if (request.take) give_up(*batch.tables[item.request], request.rows[item.at], item.place);
  }
  size_t kept = 0;
  for (size_t k = 0; k < found.size(); ++k) {
    const LazyArray<uint64_t>& index = batch.tables[found[k].request]->index;
    if (index[static_cast<size_t>(found[k].row)] == batch.neighbour_places[k]) found[kept++] = found[k];
  }
  found.resize(kept);
  stats_.neighbour_rows += kept;
}

// -- looking in, closing

VolumeStats LogVolume::stats() const {
  std::lock_guard lock(mutex_);
  std::lock_guard guard(batch_mutex_);
  VolumeStats s = stats_;
  s.disk_bytes = used_bytes();
  if (queue_) {
    s.registered_buffer_bytes = queue_->registered_bytes();
    s.io_busy_seconds = queue_->times().busy_seconds;
    s.io_flight_seconds = queue_->times().flight_seconds;
  }
  return s;
}

bool LogVolume::direct() const {
  return options_.mapped || std::all_of(folders_.begin(), folders_.end(), [](const VolumeFolder& f) { return f.direct(); });
}

std::string LogVolume::id() const {
  std::string text;
  for (const uint8_t byte : volume_) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

std::string LogVolume::name() const {
  std::string text;
  for (const std::string& p : options_.paths) text += (text.empty() ? "'" : ", '") + p + "'";
  return text;
}

std::string LogVolume::describe(const Table& table, int64_t row, Place place) const {
  return "volume " + name() + ", segment " + std::to_string(place.segment) + ", block " + std::to_string(place.block) +
         ", record " + std::to_string(place.position) + ", table '" + table.spec.name + "', row " + std::to_string(row);
}

std::string LogVolume::damage(const Table& table, int64_t row, Place place) const {
  return "damaged: " + describe(table, row, place) + " fails its checksum. Resume from a checkpoint on a sound device, or restore the "
         "volume from a copy";
}

std::vector<TableInfo> LogVolume::tables() const {
  std::lock_guard lock(mutex_);
  std::vector<TableInfo> result;
  for (const Table& t : tables_) {
    int64_t live = 0;
    for (size_t row = 0; row < t.index.size(); ++row) live += t.index[row] != 0;
    result.push_back({t.spec, live});
  }
  return result;
}

std::vector<SegmentInfo> LogVolume::segments() const {
  std::lock_guard lock(mutex_);
  std::vector<SegmentInfo> result;
  for (const auto& [number, s] : segments_) {
    result.push_back({number, s->path, s->block_bytes, s->blocks, s->kept, s->live_bytes, segment_bytes_});
  }
  return result;
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

void LogVolume::close() {
  stop_cleaner();
  std::lock_guard commit(commit_mutex_);
  Lock lock(mutex_);
  if (closed_) return;
  stop_snapshot(lock);
  closed_ = true;
  written_.wait(lock, [&] { return writing_ == 0; });
  room_made_.wait(lock, [&] { return removing_ == 0; });
  {
    Lock guard(batch_mutex_);
    batch_done_.wait(guard, [&] {
      return std::all_of(batches_.begin(), batches_.end(), [](const auto& b) { return b.second->left == 0; });
    });
  }
  for (const auto& [number, s] : segments_) {
    if (s->kept == 0 && !options_.read_only) folders_[s->path].remove_segment(number);
  }
  segments_.clear();
  for (Stream& s : streams_) {
    s.current.reset();
    s.ready.clear();
  }
  folders_.clear();
}

}  // namespace mtrains
