/* A CUDA driver and a torch on CUDA for tests without a GPU. Driver calls are written down, one a line, and succeed,
 * unless fake_fail names one. Tensors are torch's on the CPU, which the exchange table below shows as tensors of
 * cuda:N. */
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_KERNELS 64
#define MAX_PARAMETERS 64

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char* text;
static size_t length, capacity;
static char failing[64];
static int failure, capability = 90;
static void* capturing;
static _Thread_local int capture_mode;  // of this thread: 0 is global, 2 relaxed, which alone allows a module to be loaded
int fake_capture_mode(void) { return capture_mode; }

static void note(const char* format, ...) {
  char line[8192];
  va_list arguments;
  va_start(arguments, format);
  const int count = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  pthread_mutex_lock(&mutex);
  if (length + count + 2 > capacity) text = realloc(text, capacity = 2 * capacity + count + 2);
  memcpy(text + length, line, count);
  length += count;
  text[length++] = '\n';
  text[length] = 0;
  pthread_mutex_unlock(&mutex);
}

static int result(const char* name) { return strcmp(failing, name) == 0 ? failure : 0; }

void fake_reset(void) {
  pthread_mutex_lock(&mutex);
  if (text != NULL) text[length = 0] = 0;
  pthread_mutex_unlock(&mutex);
  failing[0] = 0;
  capturing = NULL;
}
const char* fake_log(void) { return text == NULL ? "" : text; }
void fake_fail(const char* name, int code) { snprintf(failing, sizeof failing, "%s", name), failure = code; }
void fake_capability(int value) { capability = value; }
void fake_capture(void* stream) { capturing = stream; }

/* --- driver --- */

typedef struct {
  char name[128];
  int count, sizes[MAX_PARAMETERS];
} Kernel;
static Kernel kernels[MAX_KERNELS];
static int num_kernels;
static _Thread_local void* current_context;

/* The bytes of each parameter of a kernel, for the log. */
void fake_kernel(const char* name, int count, const int* sizes) {
  Kernel* kernel = kernels + num_kernels++;
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->count = count;
  memcpy(kernel->sizes, sizes, count * sizeof(int));
}

int cuInit(unsigned flags) { return result("cuInit"); }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal < 4 ? result("cuDeviceGet") : 101; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(uintptr_t)(0x1000 + device);
  return result("cuDevicePrimaryCtxRetain");
}
int cuGetErrorName(int code, const char** name) { return *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : NULL, 0; }
int cuCtxGetCurrent(void** context) { return *context = current_context, 0; }
int cuCtxPushCurrent_v2(void* context) {
  note("push cuda:%d", (int)(uintptr_t)context - 0x1000);
  return current_context = context, 0;
}
int cuCtxPopCurrent_v2(void** context) {
  note("pop");
  return *context = current_context, current_context = NULL, 0;
}
void fake_set_current(int device) { current_context = (void*)(uintptr_t)(0x1000 + device); }
int fake_current(void) { return current_context == NULL ? -1 : (int)(uintptr_t)current_context - 0x1000; }

int cuModuleLoadData(void** module, const void* image) {
  note("load cuda:%d", (int)(uintptr_t)current_context - 0x1000);
  if (capturing && capture_mode != 2) return 900;  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
  return *module = (void*)image, result("cuModuleLoadData");
}
/* A cubin of fakes.py has a note for each kernel, "parameters NAME SIZE SIZE ...\n"; of others fake_kernel has told. */
static Kernel* read_kernel(const char* image, const char* name) {
  const char* end = image + *(const uint64_t*)(image + 40) + 64 * *(const uint16_t*)(image + 60);
  char wanted[160];
  const int length = snprintf(wanted, sizeof wanted, "parameters %s ", name);
  for (const char* at = image; at + length < end; ++at) {
    if (memcmp(at, wanted, length) != 0) continue;
    Kernel* kernel = calloc(1, sizeof(Kernel));
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    for (char* number = (char*)at + length; *number != '\n'; ++number) {
      kernel->sizes[kernel->count++] = (int)strtol(number, &number, 10);
    }
    return kernel;
  }
  return NULL;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  Kernel* kernel = read_kernel(module, name);
  for (int i = num_kernels - 1; kernel == NULL && i >= 0; --i) {
    if (strcmp(kernels[i].name, name) == 0) kernel = kernels + i;
  }
  return *function = kernel, kernel == NULL ? 500 : 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  note("attribute %s %d %d", ((Kernel*)function)->name, attribute, value);
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
int cuStreamIsCapturing(void* stream, int* status) { return *status = capturing == stream, 0; }
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void* stream) {
  note("fill %llx %d %zu stream %llx", (unsigned long long)address, value, bytes,
       (unsigned long long)(uintptr_t)stream);
  return result("cuMemsetD8Async");
}

typedef struct {
  int id;
  char padding[4];
  int value[16];
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned num_attributes;
} Config;

int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  const Kernel* kernel = function;
  char line[8000];
  int at =
      snprintf(line, sizeof line, "launch %s grid %u %u %u block %u %u %u shared %u stream %llx context %d attributes",
               kernel->name, config->grid[0], config->grid[1], config->grid[2], config->block[0], config->block[1],
               config->block[2], config->shared_bytes, (unsigned long long)(uintptr_t)config->stream, fake_current());
  for (unsigned i = 0; i < config->num_attributes; ++i) {
    const Attribute* attribute = config->attributes + i;
    at += snprintf(line + at, sizeof line - at, " %d:%d,%d,%d", attribute->id, attribute->value[0], attribute->value[1],
                   attribute->value[2]);
  }
  at += snprintf(line + at, sizeof line - at, " parameters");
  for (int i = 0; i < kernel->count; ++i) {
    at += snprintf(line + at, sizeof line - at, " ");
    for (int byte = 0; byte < kernel->sizes[i] && byte < 24; ++byte) { /* of a tensor map, its beginning */
      at += snprintf(line + at, sizeof line - at, "%02x", ((unsigned char*)parameters[i])[byte]);
    }
  }
  note("%s", line);
  return result("cuLaunchKernelEx");
}

/* The map holds the address and the first two extents. */
int cuTensorMapEncodeTiled(uint64_t* map, int dtype, unsigned rank, void* address, const uint64_t* extents,
                           const uint64_t* strides, const unsigned* box, const unsigned* element_strides,
                           int interleave, int swizzle, int promotion, int fill) {
  char line[1024];
  int at = snprintf(line, sizeof line, "encode dtype %d address %llx extents", dtype,
                    (unsigned long long)(uintptr_t)address);
  for (unsigned i = 0; i < rank; ++i)
    at += snprintf(line + at, sizeof line - at, " %llu", (unsigned long long)extents[i]);
  at += snprintf(line + at, sizeof line - at, " strides");
  for (unsigned i = 0; i + 1 < rank; ++i)
    at += snprintf(line + at, sizeof line - at, " %llu", (unsigned long long)strides[i]);
  at += snprintf(line + at, sizeof line - at, " box");
  for (unsigned i = 0; i < rank; ++i) at += snprintf(line + at, sizeof line - at, " %u", box[i]);
  note("%s swizzle %d interleave %d promotion %d fill %d", line, swizzle, interleave, promotion, fill);
  memset(map, 0, 128);
  map[0] = (uint64_t)(uintptr_t)address;
  map[1] = extents[0];
  map[2] = rank > 1 ? extents[1] : 0;
  for (unsigned i = 0; i < rank; ++i) {
    if (extents[i] == 0) return 1;
  }
  return result("cuTensorMapEncodeTiled");
}

/* --- torch's exchange table, with tensors of the CPU shown as those of a GPU --- */

typedef struct {
  void* data;
  int device_type, device_id, ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;
typedef struct {
  struct {
    uint32_t major, minor;
  } version;
  void* manager_ctx;
  void (*deleter)(void*);
  uint64_t flags;
  DLTensor dl_tensor;
} Managed;
typedef int (*Allocate)(DLTensor*, Managed**, void*, void (*)(void*, const char*, const char*));
typedef struct {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  Allocate allocate;
  int (*managed_from_object)(void*, Managed**);
  int (*managed_to_object)(Managed*, void**);
  int (*tensor_from_object)(void*, DLTensor*);
  int (*current_stream)(int, int, void**);
} Exchange;

static const Exchange* real;
static Exchange shown;
static int device_of_tensors, on_cuda = 1;
static const void* elsewhere;
static int device_elsewhere;
static _Thread_local void* stream_of_thread;

static void show(DLTensor* tensor) {
  if (!on_cuda) return;
  tensor->device_type = 2;
  tensor->device_id = elsewhere != NULL && tensor->data == elsewhere ? device_elsewhere : device_of_tensors;
}
static int tensor_from_object(void* object, DLTensor* tensor) {
  const int failed = real->tensor_from_object(object, tensor);
  if (!failed) show(tensor);
  return failed;
}
static int managed_from_object(void* object, Managed** managed) {
  const int failed = real->managed_from_object(object, managed);
  if (!failed) show(&(*managed)->dl_tensor);
  return failed;
}
static int current_stream(int type, int device, void** stream) { return *stream = stream_of_thread, 0; }
static int allocate(DLTensor* prototype, Managed** managed, void* context,
                    void (*set)(void*, const char*, const char*)) {
  note("allocate %lld cuda:%d", (long long)prototype->shape[0], prototype->device_id);
  if (result("allocate") != 0) return set(context, "OutOfMemoryError", "CUDA out of memory"), -1;
  DLTensor on_cpu = *prototype;
  on_cpu.device_type = 1, on_cpu.device_id = 0;
  return real->allocate(&on_cpu, managed, context, set);
}

const void* fake_exchange(const void* torch) {
  real = torch;
  shown = *real;
  shown.allocate = allocate, shown.managed_from_object = managed_from_object;
  shown.tensor_from_object = tensor_from_object, shown.current_stream = current_stream;
  return &shown;
}

/* at::toDLPackNonOwning, shown the same way. */
static void (*real_to_dlpack)(const void*, DLTensor*);
static void to_dlpack(const void* tensor, DLTensor* shown) {
  real_to_dlpack(tensor, shown);
  show(shown);
}
const void* fake_to_dlpack(void (*function)(const void*, DLTensor*)) {
  real_to_dlpack = function;
  return (const void*)to_dlpack;
}

void fake_device(int device) { on_cuda = device >= 0, device_of_tensors = device; }
void fake_elsewhere(const void* data, int device) { elsewhere = data, device_elsewhere = device; }
void fake_stream(void* stream) { stream_of_thread = stream; }
