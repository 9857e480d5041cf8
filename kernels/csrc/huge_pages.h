// Huge pages for large areas of memory whose rows are used in no order: nearly each access to one is to another page, of which the
// processor remembers few (its TLB), so that small pages cost a walk through the kernel's tables a row. The kernel decides whether it
// has any (/sys/kernel/mm/transparent_hugepage/enabled: madvise or always); memory stays as lazy as it is with small ones.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace mtrains {

constexpr size_t kHugePageBytes = 2u << 20;

inline uintptr_t next_huge_page(uintptr_t address) { return (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes; }

// Private memory of another allocator, all zero: what of it was touched is given back, and comes as zeros on huge pages once it is used.
inline void move_to_huge_pages(void* zeros, size_t bytes) {
  const uintptr_t first = next_huge_page(reinterpret_cast<uintptr_t>(zeros));
  const uintptr_t end = (reinterpret_cast<uintptr_t>(zeros) + bytes) / kHugePageBytes * kHugePageBytes;
  if (first >= end) return;
  void* const whole = reinterpret_cast<void*>(first);
  if (madvise(whole, end - first, MADV_HUGEPAGE) == 0) madvise(whole, end - first, MADV_DONTNEED);
}

}  // namespace mtrains
