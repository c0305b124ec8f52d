/* Memory of a rank's device, for C tests: the host's, or a GPU's by the driver's library, which is
 * opened when a test asks for a GPU. */
#ifndef TESTS_C_API_MEMORY_H_
#define TESTS_C_API_MEMORY_H_

#include <stdint.h>

/* `gpu`: CUDA's number, or NSA_DEVICE_CPU. */
void UseDevice(int gpu);
/* Zeroed, never freed. */
void* NewDeviceMemory(int64_t num_bytes);
void CopyToDevice(void* to, const void* from_host, int64_t num_bytes);
/* Waits for what the legacy default stream holds. */
void CopyFromDevice(void* to_host, const void* from, int64_t num_bytes);

#endif /* TESTS_C_API_MEMORY_H_ */
