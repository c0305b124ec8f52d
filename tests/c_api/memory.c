#include "tests/c_api/memory.h"

#include <dlfcn.h>
#include <stddef.h>

#include "nsa/c_api_testing.h"

/* Of the driver's interface: a status, 0 for success; addresses are 64-bit numbers. */
static struct {
  int (*init)(unsigned flags);
  int (*get_device)(int* device, int ordinal);
  int (*retain_context)(void** context, int device);
  int (*set_context)(void* context);
  int (*allocate)(uint64_t* address, size_t num_bytes);
  int (*set_bytes)(uint64_t address, unsigned char value, size_t num_bytes);
  int (*to_device)(uint64_t to, const void* from, size_t num_bytes);
  int (*from_device)(void* to, uint64_t from, size_t num_bytes);
} driver;
static int is_gpu = 0;

/* A pointer to a function from one to data, which C itself does not convert. */
static void Find(void* library, const char* symbol, void* function) {
  void* const address = dlsym(library, symbol);
  CHECK(address != NULL);
  memcpy(function, &address, sizeof(address));
}

void UseDevice(int gpu) {
  is_gpu = gpu != NSA_DEVICE_CPU;
  if (!is_gpu) return;
  void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  CHECK(library != NULL);
  Find(library, "cuInit", &driver.init);
  Find(library, "cuDeviceGet", &driver.get_device);
  Find(library, "cuDevicePrimaryCtxRetain", &driver.retain_context);
  Find(library, "cuCtxSetCurrent", &driver.set_context);
  Find(library, "cuMemAlloc_v2", &driver.allocate);
  Find(library, "cuMemsetD8_v2", &driver.set_bytes);
  Find(library, "cuMemcpyHtoD_v2", &driver.to_device);
  Find(library, "cuMemcpyDtoH_v2", &driver.from_device);
  int device = 0;
  void* context = NULL;
  CHECK(driver.init(0) == 0);
  CHECK(driver.get_device(&device, gpu) == 0);
  CHECK(driver.retain_context(&context, device) == 0);
  CHECK(driver.set_context(context) == 0);
}

void* NewDeviceMemory(int64_t num_bytes) {
  if (!is_gpu) return Allocate(num_bytes);
  uint64_t address = 0;
  const size_t size = num_bytes > 0 ? (size_t)num_bytes : 1;
  CHECK(driver.allocate(&address, size) == 0);
  CHECK(driver.set_bytes(address, 0, size) == 0);
  return (void*)(uintptr_t)address;
}

void CopyToDevice(void* to, const void* from_host, int64_t num_bytes) {
  if (is_gpu) {
    CHECK(num_bytes == 0 || driver.to_device((uint64_t)(uintptr_t)to, from_host, num_bytes) == 0);
  } else {
    memcpy(to, from_host, num_bytes);
  }
}

void CopyFromDevice(void* to_host, const void* from, int64_t num_bytes) {
  if (is_gpu) {
    CHECK(num_bytes == 0 || driver.from_device(to_host, (uint64_t)(uintptr_t)from, num_bytes) == 0);
  } else {
    memcpy(to_host, from, num_bytes);
  }
}
