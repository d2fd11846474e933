// Open addressing with linear probing over slots of four bytes, at most two thirds full. Deleting moves later entries back:
// there are no tombstones, and the table never grows.
#pragma once

#include <algorithm>
#include <utility>

#include "digest.h"

namespace kvtune::pool {

// Small numbers by their names, which the owner keeps. A slot holds a number, how far it lies from its home, and as
// many bits of the name as the largest number leaves: hardly any other name is ever looked at.
class SlotTable {
 public:
  // `most_names` at once, of numbers 0..num_numbers-1, under 2^28 of them.
  SlotTable(int64_t most_names, int64_t num_numbers)
      : number_bits_(bits_of(num_numbers)), slots_(most_names * 3 / 2 + 16) {}

  // The slot of a name, and whether it is there (else: where it belongs). `is(number)`: whether it has this name.
  template <class Is>
  std::pair<int64_t, bool> find(uint64_t mixed, Is is) const {
    const uint32_t own = own_bits(mixed);
    int64_t slot = home(mixed);
    for (uint32_t k = 0; slots_[slot] != 0; slot = next(slot), ++k) {
      const uint32_t differs = slots_[slot] ^ (own | std::min(k, FAR) << FAR_SHIFT);
      if (differs >> number_bits_ == 0 && is(number(slot))) return {slot, true};
    }
    return {slot, false};
  }

  int32_t number(int64_t slot) const { return static_cast<int32_t>(slots_[slot] & number_mask()) - 1; }

  // Into an empty slot that `find` named.
  void put(int64_t slot, uint64_t mixed, int32_t number) {
    set(slot, own_bits(mixed) | static_cast<uint32_t>(number + 1), distance(home(mixed), slot));
    ++size_;
  }

  // `mixed_of(number)`: of the name it has.
  template <class MixedOf>
  void erase(int64_t hole, MixedOf mixed_of) {
    for (int64_t slot = next(hole); slots_[slot] != 0; slot = next(slot)) {
      // An entry may fill the hole unless its home lies behind the hole on its way here.
      const int64_t from_home = far(slot) < FAR ? far(slot) : distance(home(mixed_of(number(slot))), slot);
      const int64_t from_hole = distance(hole, slot);
      if (from_home >= from_hole) {
        set(hole, slots_[slot] & ~(FAR << FAR_SHIFT), from_home - from_hole);
        hole = slot;
      }
    }
    slots_[hole] = 0;
    --size_;
  }

  void prefetch(uint64_t mixed) const { fetch(&slots_[home(mixed)]); }

  // The number that lies where the name would lie first, -1: none.
  int32_t first(uint64_t mixed) const { return number(home(mixed)); }

  void clear() {
    slots_.clear();
    size_ = 0;
  }

  int64_t size() const { return size_; }
  int64_t bytes() const { return slots_.bytes(); }

  // All numbers, in no order.
  int64_t numbers(int32_t* out) const {
    int64_t num = 0;
    for (int64_t slot = 0; slot < slots_.size(); ++slot) {
      if (slots_[slot] != 0) out[num++] = number(slot);
    }
    return num;
  }

 private:
  static constexpr int FAR_SHIFT = 28;
  static constexpr uint32_t FAR = 15;  // this far or farther

  // Of numbers 1..num_numbers; 0 is for empty slots.
  static int bits_of(int64_t num_numbers) {
    int bits = 1;
    while (num_numbers >> bits != 0) ++bits;
    return bits;
  }

  uint32_t number_mask() const { return (uint32_t{1} << number_bits_) - 1; }

  // The name's part of a slot: its home comes from the high bits.
  uint32_t own_bits(uint64_t mixed) const {
    return static_cast<uint32_t>(mixed) & ((uint32_t{1} << FAR_SHIFT) - 1) & ~number_mask();
  }

  int64_t home(uint64_t mixed) const { return place_of(mixed, slots_.size()); }
  int64_t next(int64_t slot) const { return slot + 1 == slots_.size() ? 0 : slot + 1; }
  int64_t distance(int64_t from, int64_t to) const { return to >= from ? to - from : to - from + slots_.size(); }
  uint32_t far(int64_t slot) const { return slots_[slot] >> FAR_SHIFT; }
  void set(int64_t slot, uint32_t entry, int64_t from_home) {
    slots_[slot] = entry | static_cast<uint32_t>(std::min<int64_t>(from_home, FAR)) << FAR_SHIFT;
  }

  int number_bits_;
  LazyArray<uint32_t> slots_;  // distance, bits of the name, number + 1; 0: empty
  int64_t size_ = 0;
};

}  // namespace kvtune::pool
