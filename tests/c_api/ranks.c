/* One of several ranks, or one alone, that mpirun, torchrun or nobody has started: a forward, a
 * backward and a step of decoding through the C interface, on this rank's tokens, against the same
 * of one rank on the CPU.
 *
 *   ranks cpu|cuda [NUM_TOKENS [TRANSPORT]]       TRANSPORT: a number of nsa_transport
 *
 * On the CPU o and dq are the same bit for bit; else the error is compared with the values' size.
 */
#include <math.h>

#include "nsa/c_api.h"
#include "nsa/c_api_testing.h"
#include "tests/c_api/memory.h"

enum { kHq = 32, kHkv = 2, kDim = 128, kNumNew = 2 };
static const double kMaxError = 2e-2; /* of the values' root mean square, in bf16 */

/* The whole sequence, and after it the tokens to decode. */
typedef struct Sequence {
  int64_t num_tokens;
  uint16_t *q, *k, *v, *d_o; /* bf16 [num_tokens + kNumNew, heads, kDim] */
  float* gate;               /* [num_tokens + kNumNew, kHq, 3] */
} Sequence;

/* What comes out for some tokens. */
typedef struct Results {
  int64_t num_tokens;
  uint16_t* o;         /* bf16 [num_tokens, kHq, kDim] */
  float *dq, *dk, *dv; /* [num_tokens, heads, kDim] */
  uint16_t* decoded;   /* bf16 [kNumNew, kHq, kDim] */
} Results;

static uint16_t ToBf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x8000u) >> 16);
}

static float FromBf16(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

static uint16_t* RandomBf16(int64_t count, uint64_t seed) {
  uint16_t* values = Allocate(count * 2);
  for (int64_t i = 0; i < count; ++i) values[i] = ToBf16(Random(&seed, -2, 2));
  return values;
}

static Sequence NewSequence(int64_t num_tokens) {
  const int64_t rows = num_tokens + kNumNew;
  Sequence sequence = {num_tokens,
                       RandomBf16(rows * kHq * kDim, 1),
                       RandomBf16(rows * kHkv * kDim, 2),
                       RandomBf16(rows * kHkv * kDim, 3),
                       RandomBf16(rows * kHq * kDim, 4),
                       Allocate(rows * kHq * 3 * 4)};
  uint64_t seed = 5;
  for (int64_t i = 0; i < rows * kHq * 3; ++i) sequence.gate[i] = Random(&seed, 0, 1);
  return sequence;
}

/* Rows `rows` of a tensor of the host, on the device. */
static nsa_tensor Take(const void* from, int32_t dtype, int64_t heads, int64_t dim,
                       const int64_t* rows, int64_t num_rows) {
  const int64_t row_bytes = heads * dim * (dtype == NSA_F32 ? 4 : 2);
  char* taken = Allocate(num_rows * row_bytes);
  for (int64_t i = 0; i < num_rows; ++i) {
    memcpy(taken + i * row_bytes, (const char*)from + rows[i] * row_bytes, row_bytes);
  }
  void* data = NewDeviceMemory(num_rows * row_bytes);
  CopyToDevice(data, taken, num_rows * row_bytes);
  return DenseTensor(data, dtype, 3, num_rows, heads, dim);
}

static nsa_tensor NewTensor(int32_t dtype, int64_t num_rows, int64_t heads) {
  return DenseTensor(NewDeviceMemory(num_rows * heads * kDim * (dtype == NSA_F32 ? 4 : 2)), dtype,
                     3, num_rows, heads, kDim);
}

static void* Fetch(const nsa_tensor* tensor) {
  const int64_t num_bytes = NumElements(tensor) * (tensor->dtype == NSA_F32 ? 4 : 2);
  void* values = Allocate(num_bytes);
  CopyFromDevice(values, tensor->data, num_bytes);
  return values;
}

static nsa_plan* NewPlan(int64_t num_tokens, int32_t num_ranks) {
  /* Two documents, dealt as Megatron deals them. */
  const int64_t cu_seqlens[] = {0, num_tokens / 3, num_tokens};
  NSA_NEW(nsa_plan_options, options);
  options.num_ranks = num_ranks;
  options.sharding = NSA_SHARDING_ZIGZAG_PER_DOCUMENT;
  options.cu_seqlens = cu_seqlens;
  options.num_cu_seqlens = 3;
  nsa_plan* plan = NULL;
  CHECK_OK(nsa_plan_create(&options, &plan));
  return plan;
}

/* One rank's tensors are wrong: every rank is told, and goes on. */
static void CheckWrongInputs(nsa_engine* engine, nsa_forward_inputs inputs,
                             const nsa_forward_outputs* outputs, int32_t rank, int32_t size) {
  if (rank == size - 1) {
    inputs.v_slc.dtype = 5;
    CHECK_ERROR(nsa_engine_forward(engine, &inputs, outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
                "v_slc.dtype = 5");
  } else {
    char text[32];
    snprintf(text, sizeof(text), "rank %d: ", size - 1);
    CHECK_ERROR(nsa_engine_forward(engine, &inputs, outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
                text);
  }
}

/* One rank's options cannot even be read: no other waits for it. */
static void CheckWrongOptions(nsa_group* group, const nsa_config* config, const nsa_plan* plan) {
  int32_t rank, size;
  CHECK_OK(nsa_group_rank(group, &rank, &size));
  char text[64];
  snprintf(text, sizeof(text), "rank %d: dtype = 5", size - 1);
  NSA_NEW(nsa_engine_options, engine_options);
  NSA_NEW(nsa_kv_cache_options, cache_options);
  engine_options.dtype = cache_options.dtype = rank == size - 1 ? 5 : NSA_BF16;
  nsa_engine* engine = NULL;
  nsa_kv_cache* cache = NULL;
  CHECK_ERROR(nsa_engine_create(&engine_options, config, plan, group, &engine),
              NSA_INVALID_ARGUMENT, text);
  CHECK_ERROR(nsa_kv_cache_create(&cache_options, config, group, &cache), NSA_INVALID_ARGUMENT,
              text);
}

/* Each rank takes over the second document from the forward, and decodes the tokens after it. */
static uint16_t* Decode(nsa_group* group, const nsa_config* config, nsa_engine* engine,
                        const nsa_forward_inputs* inputs, const Sequence* all) {
  int32_t rank, size;
  CHECK_OK(nsa_group_rank(group, &rank, &size));
  NSA_NEW(nsa_kv_cache_options, options);
  options.dtype = NSA_BF16;
  options.num_pages = size * (all->num_tokens / config->select_block_tokens + 2);
  nsa_kv_cache* cache = NULL;
  CHECK_OK(nsa_kv_cache_create(&options, config, group, &cache));
  int64_t sequence = 0;
  CHECK_OK(nsa_kv_cache_open(cache, &sequence));
  for (int32_t home = 0; home < size; ++home) {
    CHECK_OK(nsa_kv_cache_append_forward(cache, home, sequence, engine, inputs, 1, NULL));
  }
  int64_t rows[kNumNew];
  for (int i = 0; i < kNumNew; ++i) rows[i] = all->num_tokens + i;
  NSA_NEW(nsa_step_inputs, step);
  step.q = Take(all->q, NSA_BF16, kHq, kDim, rows, kNumNew);
  step.kv.k_slc = Take(all->k, NSA_BF16, kHkv, kDim, rows, kNumNew);
  step.kv.v_slc = Take(all->v, NSA_BF16, kHkv, kDim, rows, kNumNew);
  step.gate = Take(all->gate, NSA_F32, kHq, 3, rows, kNumNew);
  NSA_NEW(nsa_step_outputs, outputs);
  outputs.o = NewTensor(NSA_BF16, kNumNew, kHq);
  const nsa_step_sequence batch = {sequence, kNumNew, 0};
  CHECK_OK(nsa_kv_cache_step(cache, &batch, 1, &step, &outputs, NULL));
  uint16_t* decoded = Fetch(&outputs.o);
  CHECK_OK(nsa_group_barrier(group)); /* the cache's pages serve others until all have read */
  nsa_kv_cache_destroy(cache);
  return decoded;
}

/* What `group` computes of the tokens `rows` of this rank. */
static Results Compute(nsa_group* group, const nsa_plan* plan, const Sequence* all,
                       const int64_t* rows, int64_t num_rows) {
  nsa_config config;
  config.struct_size = sizeof(config);
  CHECK_OK(nsa_config_init(&config));
  config.num_q_heads = kHq;
  config.num_kv_heads = kHkv;
  CheckWrongOptions(group, &config, plan);
  NSA_NEW(nsa_engine_options, options);
  options.dtype = NSA_BF16;
  options.has_backward = 1;
  nsa_engine *first = NULL, *engine = NULL;
  CHECK_OK(nsa_engine_create(&options, &config, plan, group, &first));
  /* In the memory of one that is gone. */
  options.memory_of = first;
  CHECK_OK(nsa_engine_create(&options, &config, plan, group, &engine));
  nsa_engine_destroy(first);
  int64_t saved_bytes = 0;
  CHECK_OK(nsa_engine_saved_bytes(engine, NULL, &saved_bytes));
  NSA_NEW(nsa_save_options, save_options);
  save_options.memory = NewDeviceMemory(saved_bytes);
  nsa_saved_forward* saved = NULL;
  CHECK_OK(nsa_saved_forward_create(engine, &save_options, &saved));

  NSA_NEW(nsa_forward_inputs, inputs);
  inputs.q = Take(all->q, NSA_BF16, kHq, kDim, rows, num_rows);
  inputs.k_cmp = inputs.k_slc = inputs.k_win = Take(all->k, NSA_BF16, kHkv, kDim, rows, num_rows);
  inputs.v_cmp = inputs.v_slc = inputs.v_win = Take(all->v, NSA_BF16, kHkv, kDim, rows, num_rows);
  inputs.gate = Take(all->gate, NSA_F32, kHq, 3, rows, num_rows);
  NSA_NEW(nsa_forward_outputs, outputs);
  outputs.o = NewTensor(NSA_BF16, num_rows, kHq);
  int32_t rank, size;
  CHECK_OK(nsa_group_rank(group, &rank, &size));
  CheckWrongInputs(engine, inputs, &outputs, rank, size);
  CHECK_OK(nsa_engine_forward(engine, &inputs, &outputs, saved, NULL));

  /* As another handle finds it there. */
  nsa_saved_forward_destroy(saved);
  save_options.is_filled = 1;
  CHECK_OK(nsa_saved_forward_create(engine, &save_options, &saved));
  const nsa_tensor d_o = Take(all->d_o, NSA_BF16, kHq, kDim, rows, num_rows);
  NSA_NEW(nsa_gradients, gradients);
  gradients.dq = NewTensor(NSA_F32, num_rows, kHq);
  gradients.dk_cmp = gradients.dk_slc = gradients.dk_win = NewTensor(NSA_F32, num_rows, kHkv);
  gradients.dv_cmp = gradients.dv_slc = gradients.dv_win = NewTensor(NSA_F32, num_rows, kHkv);
  CHECK_OK(nsa_engine_backward(engine, &inputs, &d_o, saved, &gradients, NULL));
  Results results = {.num_tokens = num_rows,
                     .o = Fetch(&outputs.o),
                     .dq = Fetch(&gradients.dq),
                     .dk = Fetch(&gradients.dk_cmp),
                     .dv = Fetch(&gradients.dv_cmp)};
  CHECK_OK(nsa_group_health(group));

  /* The cache takes over what the last forward left. */
  CHECK_OK(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL));
  results.decoded = Decode(group, &config, engine, &inputs, all);
  const char* text = NULL;
  CHECK_OK(nsa_engine_gather_stats(engine, &text));
  if (rank == 0 && size > 1) printf("stats: %.160s...\n", text);
  nsa_saved_forward_destroy(saved);
  nsa_engine_destroy(engine);
  return results;
}

static Results ComputeAlone(const Sequence* all) {
  UseDevice(NSA_DEVICE_CPU);
  NSA_NEW(nsa_group_options, options);
  options.device = NSA_DEVICE_CPU;
  nsa_group* group = NULL;
  CHECK_OK(nsa_group_create(&options, &group));
  nsa_plan* plan = NewPlan(all->num_tokens, 1);
  int64_t* rows = Allocate(all->num_tokens * 8);
  CHECK_OK(nsa_plan_positions(plan, 0, rows, NULL, NULL));
  const Results results = Compute(group, plan, all, rows, all->num_tokens);
  nsa_plan_destroy(plan);
  nsa_group_destroy(group);
  return results;
}

/* Compares rows of `width` values with those at `rows` of what is expected. */
static void Compare(const char* name, int is_bf16, int is_exact, const void* values,
                    const void* expected, int64_t width, const int64_t* rows, int64_t num_rows) {
  double error = 0, size = 0;
  int64_t num_different = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = i * width + j, there = rows[i] * width + j;
      const float got =
          is_bf16 ? FromBf16(((const uint16_t*)values)[at]) : ((const float*)values)[at];
      const float want =
          is_bf16 ? FromBf16(((const uint16_t*)expected)[there]) : ((const float*)expected)[there];
      num_different += got != want;
      error += (double)(got - want) * (got - want);
      size += (double)want * want;
    }
  }
  const double relative = num_rows == 0 ? 0 : sqrt(error / size);
  printf("%s: %lld rows, %lld values differ, relative error %.2e\n", name, (long long)num_rows,
         (long long)num_different, relative);
  CHECK(relative <= kMaxError);
  CHECK(!is_exact || num_different == 0);
}

int main(int argc, char** argv) {
  CHECK(argc >= 2);
  const int on_gpu = strcmp(argv[1], "cuda") == 0;
  const Sequence all = NewSequence(argc > 2 ? atoll(argv[2]) : 700);
  const Results expected = ComputeAlone(&all);

  const char* local_rank = getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  if (local_rank == NULL) local_rank = getenv("LOCAL_RANK");
  NSA_NEW(nsa_group_options, options);
  options.from_environment = 1;
  options.device = on_gpu ? (local_rank == NULL ? 0 : atoi(local_rank)) : NSA_DEVICE_CPU;
  options.transport = argc > 3 ? atoi(argv[3]) : NSA_TRANSPORT_AUTO;
  options.timeout_ms = 30000;
  nsa_group* group = NULL;
  if (nsa_group_create(&options, &group) != NSA_OK) {
    fprintf(stderr, "nsa_group_create: %s\n", nsa_last_error());
    return 2;
  }
  UseDevice(options.device);
  int32_t rank, size;
  CHECK_OK(nsa_group_rank(group, &rank, &size));
  nsa_plan* plan = NewPlan(all.num_tokens, size);
  int64_t num_rows = 0;
  CHECK_OK(nsa_plan_tokens_of_rank(plan, rank, &num_rows));
  int64_t* rows = Allocate(num_rows * 8);
  CHECK_OK(nsa_plan_positions(plan, rank, rows, NULL, NULL));
  const Results results = Compute(group, plan, &all, rows, num_rows);

  const int64_t new_rows[] = {0, 1};
  Compare("o", 1, !on_gpu, results.o, expected.o, kHq * kDim, rows, num_rows);
  Compare("dq", 0, !on_gpu, results.dq, expected.dq, kHq * kDim, rows, num_rows);
  Compare("dk", 0, 0, results.dk, expected.dk, kHkv * kDim, rows, num_rows);
  Compare("dv", 0, 0, results.dv, expected.dv, kHkv * kDim, rows, num_rows);
  Compare("decoded o", 1, !on_gpu, results.decoded, expected.decoded, kHq * kDim, new_rows,
          kNumNew);

  /* Rank 0 gives up as soon as all have come here, perhaps before they have left. */
  const nsa_status all_here = nsa_group_barrier(group);
  CHECK(all_here == NSA_OK || (rank > 0 && all_here == NSA_ABORTED));
  if (size > 1) {
    if (rank == 0) CHECK_OK(nsa_group_abort(group, "that will do"));
    CHECK_ERROR(nsa_group_barrier(group), NSA_ABORTED, "that will do");
  }
  nsa_group_destroy(group);
  nsa_plan_destroy(plan);
  printf("rank %d of %d: passed\n", rank, size);
  return 0;
}
