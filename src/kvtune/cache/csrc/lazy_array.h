// Arrays of a fixed size that take no memory before they are written.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace kvtune {

// Zeros, from the start of a cache line on; pages are taken from the system when they are first written.
template <class T>
class LazyArray {
 public:
  explicit LazyArray(int64_t size)
      : size_(size), memory_(std::calloc(static_cast<size_t>(size) * sizeof(T) + LINE, 1)) {
    if (!memory_) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + LINE - 1) / LINE * LINE);
  }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* data() { return data_; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
  void clear() { std::memset(static_cast<void*>(data_), 0, static_cast<size_t>(bytes())); }

 private:
  static constexpr size_t LINE = 64;

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  int64_t size_;
  std::unique_ptr<void, Free> memory_;
  T* data_;
};

}  // namespace kvtune
