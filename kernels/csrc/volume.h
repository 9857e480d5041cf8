// The seam between the slot pools above and the stores below.
//
// A volume holds tables of fixed-size records, addressed by (table, row). A record's payload is the concatenation of
// "parts": a row's weights, then each of its optimizer states. A part is an array in memory with one element a slot, so
// a batch of records is described by (rows, slots, parts): the payload of rows[i] is gathered from, or scattered to,
// parts[p].base + slots[i] * parts[p].stride_bytes for each p in order.
//
// What always holds:
//   - a get sees every put that returned before the get was submitted (a row is never stale), wherever it is buffered;
//   - a row that was never put reads as its table's initial value;
//   - parts stay valid and their slots untouched from submit_get until wait() of its token returns;
//   - a neighbour (below) is what a get during the wait would have read;
//   - every call may be made from any thread;
//   - errors are thrown as Error (errors.h) from the call that can still name what failed: a bad argument before anything
//     changes, a failed read from wait() of its token, a failed write from the next put, flush or checkpoint.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "initializer.h"
#include "row_set.h"

namespace mtrains {

struct Part {
  std::byte* base;
  uint64_t stride_bytes;
  uint32_t bytes;
};

using TableId = uint32_t;

struct GetRequest {
  TableId table;
  std::vector<int64_t> rows;
  std::vector<int32_t> slots;
  std::vector<Part> parts;
  // The caller will put or evict every one of these rows as changed: the tiers below need not keep what they have. A get of one
  // before that may throw, and a checkpoint does.
  bool take = false;
  // Rows of this table that the caller would like to have too, where they cost no I/O: those that happen to lie in the pages
  // read for this batch come back as neighbours. Belongs to the caller and must outlive the wait; it may change meanwhile.
  const RowSet* wanted = nullptr;
};

// A wanted row that came along with the pages read for others. It is what a get during the wait would have read, so a row that
// was taken and not put yet is the taker's to leave out. It is never a row that its own batch asks for, but may be one that
// another get in flight does. It stays in its volume: `take` does not reach it.
//
// Which of the wanted rows come along, if any, is the medium's affair: there are none without pages to read (memory, mapped
// files, write buffers, caches), a damaged one is left out until someone asks for it, and any other may be.
struct Neighbour {
  uint32_t request;  // of its batch: one that wanted it
  uint32_t bytes;    // of its payload
  int64_t row;
  uint64_t at;       // where its payload begins in Neighbours::payloads
};
struct Neighbours {
  std::vector<Neighbour> rows;
  std::vector<std::byte> payloads;
};

struct TableSpec {
  std::string name;
  int64_t row_count;
  uint32_t record_bytes;  // payload bytes of one record
};

struct VolumeStats {
  uint64_t get_rows = 0;            // rows asked for
  uint64_t get_rows_initial = 0;    // of these, never put: generated
  uint64_t get_rows_buffered = 0;   // of these, found in the write buffer
  uint64_t get_rows_mapped = 0;     // of these, loaded from a mapped file
  uint64_t put_rows = 0;
  uint64_t read_ios = 0;
  uint64_t read_bytes = 0;
  uint64_t neighbour_rows = 0;      // wanted rows that came along
  uint64_t write_ios = 0;
  uint64_t write_bytes = 0;
  uint64_t disk_bytes = 0;          // space the volume occupies now
  uint64_t checkpoints = 0;
  uint64_t cleaned_segments = 0;
  uint64_t moved_rows = 0;          // newest records that cleaning copied; write_bytes counts them too
  uint64_t clean_read_ios = 0;
  uint64_t clean_read_bytes = 0;
  double read_wait_seconds = 0;     // callers blocked in wait()
  double io_busy_seconds = 0;       // any I/O was in flight
  double io_flight_seconds = 0;     // of every I/O: over the busy time, the mean depth of the queue
  uint64_t registered_buffer_bytes = 0;  // of read buffers that the kernel holds mapped; 0 where it refused, or there is none
};

class Volume {
 public:
  virtual ~Volume() = default;

  // Opens or creates a table; the same name with another shape throws kVolumeMismatch.
  virtual TableId table(const TableSpec& spec, const Initializer& init) = 0;

  virtual void put(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots,
                   std::span<const Part> parts) = 0;

  // The rows leave the caller's memory, where a put says that it keeps them: a cache may hold them for the next get. Those
  // that are not dirty equal what the volume has.
  virtual void evict(TableId table, std::span<const int64_t> rows, std::span<const int32_t> slots,
                     std::span<const Part> parts, bool dirty) {
    if (dirty) put(table, rows, slots, parts);
  }

  // Starts reads of many tables as one batch and returns a token; wait(token) returns when every part is filled.
  // Every token must be waited for once. wait(0) is a no-op. `ready` is called once, on any thread, when wait would not block for
  // long; not at all if the token is 0.
  virtual uint64_t submit_get(std::vector<GetRequest> requests, std::function<void()> ready = {}) = 0;
  virtual Neighbours wait(uint64_t token) = 0;

  virtual void flush() = 0;                      // everything put so far is handed to the device
  virtual void checkpoint(uint64_t epoch) = 0;   // everything put so far is durable and named by this epoch
  virtual std::vector<uint64_t> epochs() const = 0;  // committed and kept, ascending
  virtual void restore(uint64_t epoch) = 0;      // back to the state of a kept epoch; later ones are forgotten
  virtual VolumeStats stats() const = 0;
  virtual const char* backend() const = 0;       // "memory", "io_uring", "pread"
  virtual std::string id() const = 0;            // names this volume, and no other
  virtual void close() = 0;
};

// What the implementations share.
void require_open(bool closed, const std::string& volume);
bool is_valid(const TableSpec& spec);
void require_valid(const TableSpec& spec);
void require_same_shape(const TableSpec& have, const TableSpec& asked, const std::string& volume);
void require_rows(const TableSpec& spec, std::span<const int64_t> rows);
void require_newer(std::span<const uint64_t> epochs, uint64_t epoch, const std::string& volume);
void gather_record(std::span<const Part> parts, int32_t slot, std::byte* record);
void scatter_record(const std::byte* record, std::span<const Part> parts, int32_t slot);

}  // namespace mtrains
