// Arrays of a fixed size that take no memory before they are written.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace kvtune {

// Zeros; pages are taken from the system when they are first written.
template <class T>
class LazyArray {
 public:
  explicit LazyArray(int64_t size)
      : size_(size),
        data_(static_cast<T*>(std::calloc(static_cast<size_t>(size > 0 ? size : 1), sizeof(T)))) {
    if (!data_) throw std::bad_alloc();
  }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }
  T* data() { return data_.get(); }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
  void clear() { std::memset(data_.get(), 0, static_cast<size_t>(bytes())); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  int64_t size_;
  std::unique_ptr<T, Free> data_;
};

}  // namespace kvtune
