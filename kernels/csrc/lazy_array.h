// LazyArray: a zero-filled array whose pages exist once touched; large ones lie on huge pages where the kernel has them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "huge_pages.h"

namespace mtrains {

template <class T>
class LazyArray {
 public:
  explicit LazyArray(size_t count) : count_(count) {
    const size_t bytes = std::max<size_t>(count * sizeof(T), 1);
    const bool huge = bytes >= kHugePageBytes;
    mapped_bytes_ = huge ? bytes + kHugePageBytes : bytes;  // room to begin at a huge page's border
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    auto address = reinterpret_cast<uintptr_t>(mapping_);
    if (huge) {
      address = next_huge_page(address);
      madvise(reinterpret_cast<void*>(address), bytes, MADV_HUGEPAGE);
    }
    data_ = reinterpret_cast<T*>(address);
  }
  ~LazyArray() {
    if (mapping_) munmap(mapping_, mapped_bytes_);
  }
  LazyArray(LazyArray&& other) noexcept
      : data_(other.data_), count_(other.count_), mapping_(std::exchange(other.mapping_, nullptr)),
        mapped_bytes_(other.mapped_bytes_) {}
  LazyArray(const LazyArray&) = delete;
  LazyArray& operator=(const LazyArray&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }
  void grow(size_t count);       // keeps what there is; the rest is zero
  void clear() { madvise(mapping_, mapped_bytes_, MADV_DONTNEED); }  // every element is zero again

 private:
  T* data_ = nullptr;
  size_t count_;
  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
};

template <class T>
void LazyArray<T>::grow(size_t count) {
  LazyArray larger(count);
  constexpr size_t kPiece = (64u << 10) / sizeof(T);
  for (size_t first = 0; first < count_; first += kPiece) {  // pieces of zeros stay untouched
    const size_t n = std::min(kPiece, count_ - first);
    if (std::any_of(data_ + first, data_ + first + n, [](const T& x) { return x != T{}; })) {
      std::copy_n(data_ + first, n, larger.data_ + first);
    }
  }
  std::swap(data_, larger.data_);
  std::swap(count_, larger.count_);
  std::swap(mapping_, larger.mapping_);
  std::swap(mapped_bytes_, larger.mapped_bytes_);
}

}  // namespace mtrains
