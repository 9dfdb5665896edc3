/* A stand-in for CUDA's driver: device memory is the process's own, and a launch is written down instead of run.
 *
 * A module's image is text: "k25 test image", the kernel's name, the number of its parameters and the bytes of each.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PARAMETERS = 128, NAME = 256, MOST_MODULES = 4096 };

typedef struct {
  char image[NAME], function[NAME];
  unsigned grid[3], block[3], shared;
  void* stream;
  int32_t parameters;
  int32_t sizes[MOST_PARAMETERS];
  unsigned char values[MOST_PARAMETERS][8];
} Record;

typedef struct {
  char image[NAME], function[NAME];
  int parameters, sizes[MOST_PARAMETERS], shared;
} Module;

static Module modules[MOST_MODULES];
static int module_count, capturing, fails, has_context = 1;
static char failing[64];
static Record* records;
static int record_count;
static int major = 9, minor = 0, shared_limit = 232448, processors = 3;

void fake_device(int capability, int shared, int count) {
  major = capability / 10;
  minor = capability % 10;
  shared_limit = shared;
  processors = count;
}
void fake_capturing(int is_capturing) { capturing = is_capturing; }
void fake_context(int has) { has_context = has; }
void fake_failure(const char* function, int result) {
  snprintf(failing, sizeof failing, "%s", function);
  fails = result;
}
int fake_record_count(void) { return record_count; }
int fake_module_count(void) { return module_count; }
const Record* fake_record(int index) { return &records[index]; }
void fake_clear(void) { record_count = 0; }

#define MAY_FAIL() \
  if (fails != 0 && strcmp(failing, __func__) == 0) return fails

int cuInit(unsigned flags) {
  (void)flags;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = has_context ? &modules : NULL;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cuCtxGetId(void* context, unsigned long long* id) {
  *id = (unsigned long long)(100 * major + 10 * minor) + (context != NULL);
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  MAY_FAIL();
  (void)device;
  *value = attribute == 16 ? processors : attribute == 75 ? major : attribute == 76 ? minor : shared_limit;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  MAY_FAIL();
  const char* text = image;
  if (module_count == MOST_MODULES || strncmp(text, "k25 test image\n", 15) != 0) return 200;
  Module* made = &modules[module_count++];
  memset(made, 0, sizeof *made);
  int used = 0;
  text += 15;
  if (sscanf(text, "%255s %d%n", made->image, &made->parameters, &used) != 2) return 200;
  for (int index = 0; index < made->parameters; ++index) {
    text += used;
    if (sscanf(text, "%d%n", &made->sizes[index], &used) != 1) return 200;
  }
  *module = made;
  return 0;
}
int cuModuleUnload(void* module) {
  (void)module;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  MAY_FAIL();
  snprintf(((Module*)module)->function, NAME, "%s", name);
  *function = module;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute == 8) ((Module*)function)->shared = value;
  return attribute == 8 && value > shared_limit ? 1 : 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  MAY_FAIL();
  const Module* module = function;
  if (extra != NULL || shared > (unsigned)module->shared || gy > 65535 || gz > 65535) return 1;
  records = realloc(records, sizeof(Record) * (size_t)(record_count + 1));
  Record* made = &records[record_count++];
  memset(made, 0, sizeof *made);
  memcpy(made->image, module->image, NAME);
  memcpy(made->function, module->function, NAME);
  made->grid[0] = gx, made->grid[1] = gy, made->grid[2] = gz;
  made->block[0] = bx, made->block[1] = by, made->block[2] = bz;
  made->shared = shared;
  made->stream = stream;
  made->parameters = module->parameters;
  for (int index = 0; index < module->parameters; ++index) {
    made->sizes[index] = module->sizes[index];
    memcpy(made->values[index], parameters[index], (size_t)module->sizes[index]);
  }
  return 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  MAY_FAIL();
  (void)stream;
  memmove((void*)(uintptr_t)to, (const void*)(uintptr_t)from, bytes);
  return 0;
}
int cuStreamIsCapturing(void* stream, int* status) {
  (void)stream;
  *status = capturing;
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 700 ? "an illegal memory access was encountered" : "something else";
  return 0;
}
