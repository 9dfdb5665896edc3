// Memory of one call, and of one thread. Aligned to 64 bytes, not initialised.
#ifndef K25_SCRATCH_H
#define K25_SCRATCH_H

#include <stddef.h>

namespace k25 {

// Blocks that live as long as this object. A few MB stay with the calling thread for its next call.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // Null where there is no memory.
  void* take(size_t bytes);

 private:
  void* blocks_;  // a list
  char* at_;
  size_t left_;
  bool owns_arena_;
};

// A block of the calling thread, for use inside one task: the next call by the same thread takes it back. Null where there
// is no memory.
void* thread_scratch(size_t bytes);

}  // namespace k25
#endif
