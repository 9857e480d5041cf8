// LogVolume: opening and closing, tables, and looking in.
#include <algorithm>
#include <bit>

#include "errors.h"
#include "log_volume.h"

namespace mtrains {
namespace {

bool same(const Initializer& a, const Initializer& b) {
  return a.zero == b.zero && (a.zero || (a.seed == b.seed && a.low == b.low && a.high == b.high && a.first_row == b.first_row &&
                                         a.columns == b.columns && a.type == b.type));
}

std::string quoted(const std::vector<std::string>& paths) {
  std::string text;
  for (const std::string& p : paths) text += (text.empty() ? "'" : ", '") + p + "'";
  return text;
}

}  // namespace

// -- opening

LogVolume::LogVolume(LogOptions options)
    : options_(std::move(options)), system_(options_.system ? *options_.system : System::real()), name_(quoted(options_.paths)),
      writer_(name_, folders_, mutex_, [this](uint32_t block_bytes) { return make_segment(block_bytes); }), reader_(name_) {
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
    writer_.start(queue_.get());
    reader_.start(queue_.get());
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

LogTable& LogVolume::add_table(const TableSpec& spec, const Initializer& init) {
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
  const std::deque<LogStream>& streams = writer_.streams();
  const bool known = std::any_of(streams.begin(), streams.end(), [&](const LogStream& s) { return s.block_bytes == shape.block_bytes; });
  const uint64_t least = (streams.size() + (known ? 1 : 3)) * segment_bytes_ + manifest_bytes();  // a segment a stream, one to turn over
  if (least > options_.capacity_bytes && !options_.read_only) {
    throw Error(ErrorKind::kConfiguration, "table '" + spec.name + "' does not fit: the tables of volume " + name_ +
                                               " need capacity_bytes of at least " + std::to_string(least) + " before any row, got " +
                                               std::to_string(options_.capacity_bytes) + "; each size of block has two segments of " +
                                               std::to_string(segment_bytes_) + " bytes open. Nothing was changed");
  }
  auto open = [&](bool survivors) {
    LogStream& stream = writer_.stream(shape.block_bytes, survivors);
    ++stream.tables;
    OpenBlock block{&stream, survivors ? LogTable::kOpen | LogTable::kMoved : LogTable::kOpen, aligned_bytes(shape.block_bytes), {}};
    block.rows.reserve(shape.records);
    return block;
  };
  return tables_.emplace_back(LogTable{static_cast<TableId>(tables_.size() + 1), spec, init, shape,
                                    LazyArray<uint64_t>(static_cast<size_t>(spec.row_count)), open(false), open(true)});
}

TableId LogVolume::table(const TableSpec& spec, const Initializer& init) {
  std::lock_guard lock(mutex_);
  require_open(closed_, name_);
  require_valid(spec);
  for (const LogTable& t : tables_) {
    if (t.spec.name != spec.name) continue;
    if (options_.read_only) return t.id - 1;  // as it was written
    require_same_shape(t.spec, spec, name_);
    if (!same(t.init, init)) {
      throw Error(ErrorKind::kVolumeMismatch, "volume " + name_ + " holds table '" + spec.name +
                                                  "' with other initial values (seed, range or place in the table). Nothing was "
                                                  "changed. Use the seed and sharding that wrote it, or name another path");
    }
    return t.id - 1;
  }
  if (options_.read_only) throw Error(ErrorKind::kVolumeMismatch, "volume " + name_ + " holds no table '" + spec.name + "'");
  return add_table(spec, init).id - 1;
}

void LogVolume::grow(TableId id, int64_t row_count) {
  std::scoped_lock alone(commit_mutex_, moving_mutex_);  // a checkpoint may be about to start a snapshot of the old size
  Lock lock(mutex_);
  require_usable();
  require_writable();
  LogTable& table = tables_.at(id);
  TableSpec larger = table.spec;
  larger.row_count = row_count;
  require_valid(larger);
  if (row_count < table.spec.row_count) {
    throw Error(ErrorKind::kConfiguration, "table '" + table.spec.name + "' has " + std::to_string(table.spec.row_count) +
                                               " rows and cannot shrink to " + std::to_string(row_count));
  }
  stop_snapshot(lock);  // its pages are of the old size
  table.index.grow(static_cast<size_t>(row_count));
  table.spec.row_count = row_count;
}

// -- what it can do

void LogVolume::require_writable() const {
  if (options_.read_only) throw Error(ErrorKind::kVolume, "volume " + name_ + " is open for reading; nothing in it can change");
}

void LogVolume::require_loaded() const {
  require_open(closed_, name_);
  if (!restore_error_.empty()) {
    throw Error(ErrorKind::kVolume, "volume " + name_ + " holds nothing to serve: " + restore_error_ + ". Restore again, that epoch or "
                                        "another that it keeps, or close it");
  }
  if (awaiting_restore_) {
    std::string epochs;
    for (const Kept& k : kept_) epochs += (epochs.empty() ? "" : ", ") + std::to_string(k.epoch);
    throw Error(ErrorKind::kVolumeMismatch, "volume " + name_ + " holds the checkpoints (" + epochs + ") of an earlier job. "
                                                "Nothing was changed. Resume from one (load_checkpoint), or name another path");
  }
}

void LogVolume::require_usable() const {
  require_loaded();
  writer_.require_sound();
}

// -- looking in, closing

VolumeStats LogVolume::stats() const {
  std::lock_guard lock(mutex_);
  VolumeStats s = stats_;
  writer_.add_to(s);
  reader_.add_to(s);
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

std::vector<TableInfo> LogVolume::tables() const {
  std::lock_guard lock(mutex_);
  std::vector<TableInfo> result;
  for (const LogTable& t : tables_) {
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

void LogVolume::on_io(const IoJob& job, const std::byte* data, int error) {
  if (job.write) {
    writer_.on_written(*static_cast<LogChunk*>(job.owner), error);
  } else {
    reader_.on_read(job, data, error);
  }
}

void LogVolume::close() {
  stop_cleaner();
  std::lock_guard commit(commit_mutex_);
  Lock lock(mutex_);
  if (closed_) return;
  stop_snapshot(lock);
  closed_ = true;
  writer_.close();
  writer_.wait_for_writes(lock);
  room_made_.wait(lock, [&] { return removing_ == 0; });
  reader_.wait_for_all();
  for (const auto& [number, s] : segments_) {
    if (s->kept == 0 && !options_.read_only) folders_[s->path].remove_segment(number);
  }
  segments_.clear();
  writer_.reset();
  folders_.clear();
}

}  // namespace mtrains
