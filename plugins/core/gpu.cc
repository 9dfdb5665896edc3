// What all GPU launches share: loading, and what callers promise. The launches are in k25_plugins/<op>/gpu.cc.
#include <stdlib.h>

#include <atomic>

#include "gpu_kernels.h"
#include "k25.h"

namespace k25 {
namespace {

int32_t told_by_environment() {
  const char* text = getenv("K25_GPU_EVEN_ROWS");
  return text != nullptr && text[0] == '1' ? 1 : 0;
}

std::atomic<int32_t> even_rows{told_by_environment()};

}  // namespace

bool gpu_rows_are_even() { return even_rows.load(std::memory_order_relaxed) != 0; }

}  // namespace k25

using namespace k25;

extern "C" {

int32_t k25_gpu_kernel_count(void) {
  int count = 0;
  gpu_kernels(&count);
  return count;
}

k25_status k25_gpu_prepare(k25_message message) { return prepare_gpu_kernels(message); }

void k25_gpu_set_even_rows(int32_t is_even) { even_rows.store(is_even, std::memory_order_relaxed); }

}  // extern "C"
