#include "scratch.h"

#include <stdint.h>
#include <stdlib.h>

namespace k25 {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kArenaBytes = size_t{1} << 21;

size_t rounded(size_t bytes) { return (bytes + kAlignment - 1) & ~(kAlignment - 1); }

void* aligned(size_t bytes) {
  void* found = nullptr;
  return posix_memalign(&found, kAlignment, bytes) == 0 ? found : nullptr;
}

// What a thread keeps until it ends.
struct Kept {
  char* data = nullptr;
  size_t bytes = 0;
  bool used = false;
  ~Kept() { free(data); }
  char* grown(size_t wanted) {
#if defined(__SANITIZE_ADDRESS__)
    const bool fits = wanted == bytes;  // exactly, so that what is written past it is noticed
#else
    const bool fits = wanted <= bytes;
#endif
    if (!fits) {
      free(data);
      data = static_cast<char*>(aligned(wanted));
      bytes = data == nullptr ? 0 : wanted;
    }
    return data;
  }
};
thread_local Kept arena;
thread_local Kept task_block;

}  // namespace

Scratch::Scratch() : blocks_(nullptr), at_(nullptr), left_(0), owns_arena_(!arena.used) {
  if (!owns_arena_) return;
  arena.used = true;
  at_ = arena.grown(kArenaBytes);
  left_ = arena.bytes;
}

Scratch::~Scratch() {
  while (blocks_ != nullptr) {
    void* next = *static_cast<void**>(blocks_);
    free(blocks_);
    blocks_ = next;
  }
  if (owns_arena_) arena.used = false;
}

void* Scratch::take(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  const size_t wanted = rounded(bytes == 0 ? 1 : bytes);
  if (wanted <= left_) {
    void* found = at_;
    at_ += wanted;
    left_ -= wanted;
    return found;
  }
  char* block = static_cast<char*>(aligned(wanted + kAlignment));
  if (block == nullptr) return nullptr;
  *reinterpret_cast<void**>(block) = blocks_;
  blocks_ = block;
  return block + kAlignment;
}

void* thread_scratch(size_t bytes) { return task_block.grown(rounded(bytes == 0 ? 1 : bytes)); }

}  // namespace k25
