/* The C interface as a C program uses it, on one rank of the CPU: errors, plans, and values that
 * are those of the C++ engine, bit for bit. */
#include "nsa/c_api.h"

#include <math.h>

#include "nsa/c_api_testing.h"
#include "nsa/c_api_testlib.h"

enum { kNumTokens = 300, kHq = 4, kHkv = 2, kDk = 64, kDv = 128, kHidden = 8, kTopN = 5, kL = 32 };
static const int64_t kCuSeqlens[] = {0, 100, 100, kNumTokens}; /* one document is empty */
enum { kNumCuSeqlens = 4 };

static nsa_config TestConfig(void) {
  nsa_config config;
  config.struct_size = sizeof(config);
  CHECK_OK(nsa_config_init(&config));
  config.num_q_heads = kHq;
  config.num_kv_heads = kHkv;
  config.head_dim_qk = kDk;
  config.head_dim_v = kDv;
  config.num_selected_blocks = kTopN;
  config.window_tokens = 40;
  config.compressor = NSA_COMPRESSOR_MLP;
  return config;
}

static nsa_group* TestGroup(void) {
  NSA_NEW(nsa_group_options, options);
  options.device = NSA_DEVICE_CPU;
  nsa_group* group = NULL;
  CHECK_OK(nsa_group_create(&options, &group));
  return group;
}

static nsa_plan* TestPlan(void) {
  NSA_NEW(nsa_plan_options, options);
  options.cu_seqlens = kCuSeqlens;
  options.num_cu_seqlens = kNumCuSeqlens;
  nsa_plan* plan = NULL;
  CHECK_OK(nsa_plan_create(&options, &plan));
  return plan;
}

/* Shapes by the enum of nsa/c_api_testlib.h. */
static nsa_tensor NewInput(int which) {
  static const int64_t kShapes[kNumInputs][3] = {{kNumTokens, kHq, kDk},
                                                 {kNumTokens, kHkv, kDk},
                                                 {kNumTokens, kHkv, kDv},
                                                 {kNumTokens, kHkv, kDk},
                                                 {kNumTokens, kHkv, kDv},
                                                 {kNumTokens, kHkv, kDk},
                                                 {kNumTokens, kHkv, kDv},
                                                 {kNumTokens, kHq, 3},
                                                 {1, kL, kDk},
                                                 {1, kHidden, kL * kDk},
                                                 {1, kHidden, 0},
                                                 {1, kDk, kHidden},
                                                 {1, kDk, 0},
                                                 {1, kL, kDv},
                                                 {1, kHidden, kL * kDv},
                                                 {1, kHidden, 0},
                                                 {1, kDv, kHidden},
                                                 {1, kDv, 0}};
  const int64_t* shape = kShapes[which];
  nsa_tensor tensor =
      DenseTensor(NULL, NSA_F32, shape[2] == 0 ? 2 : 3, shape[0], shape[1], shape[2]);
  tensor.data = Allocate(NumElements(&tensor) * 4);
  return tensor;
}

static nsa_tensor NewOutput(void) {
  return DenseTensor(Allocate(kNumTokens * kHq * kDv * 4), NSA_F32, 3, kNumTokens, kHq, kDv);
}

static ExpectedRun NewRun(void) {
  ExpectedRun run;
  for (int i = 0; i < kNumInputs; ++i) {
    run.inputs[i] = NewInput(i);
    run.gradients[i] = NewInput(i);
  }
  run.d_o = NewOutput();
  run.o = NewOutput();
  for (int i = 0; i < 3; ++i) run.lse[i] = Allocate(kNumTokens * kHq * 4);
  run.block_indices = Allocate(kNumTokens * kHkv * kTopN * 4);
  return run;
}

static void Fill(nsa_tensor* tensor, uint64_t seed, float low, float high) {
  float* values = tensor->data;
  for (int64_t i = 0; i < NumElements(tensor); ++i) values[i] = Random(&seed, low, high);
}

static void FillInputs(ExpectedRun* run) {
  for (int i = 0; i < kNumActivations; ++i)
    Fill(&run->inputs[i], 100 + i, i == kGate ? 0 : -2, i == kGate ? 1 : 2);
  for (int i = kNumActivations; i < kNumInputs; ++i) Fill(&run->inputs[i], 100 + i, -0.1f, 0.1f);
  Fill(&run->d_o, 99, -1, 1);
}

static nsa_forward_inputs ForwardInputs(const nsa_tensor* in) {
  NSA_NEW(nsa_forward_inputs, inputs);
  inputs.q = in[kQ];
  inputs.k_cmp = in[kKCmp];
  inputs.v_cmp = in[kVCmp];
  inputs.k_slc = in[kKSlc];
  inputs.v_slc = in[kVSlc];
  inputs.k_win = in[kKWin];
  inputs.v_win = in[kVWin];
  inputs.gate = in[kGate];
  inputs.compress_k.pe = in[kKPe];
  inputs.compress_k.w1 = in[kKW1];
  inputs.compress_k.b1 = in[kKB1];
  inputs.compress_k.w2 = in[kKW2];
  inputs.compress_k.b2 = in[kKB2];
  inputs.compress_v.pe = in[kVPe];
  inputs.compress_v.w1 = in[kVW1];
  inputs.compress_v.b1 = in[kVB1];
  inputs.compress_v.w2 = in[kVW2];
  inputs.compress_v.b2 = in[kVB2];
  return inputs;
}

static nsa_gradients GradientsOf(const nsa_tensor* out) {
  NSA_NEW(nsa_gradients, gradients);
  gradients.dq = out[kQ];
  gradients.dk_cmp = out[kKCmp];
  gradients.dv_cmp = out[kVCmp];
  gradients.dk_slc = out[kKSlc];
  gradients.dv_slc = out[kVSlc];
  gradients.dk_win = out[kKWin];
  gradients.dv_win = out[kVWin];
  gradients.dgate = out[kGate];
  gradients.dcompress_k.pe = out[kKPe];
  gradients.dcompress_k.w1 = out[kKW1];
  gradients.dcompress_k.b1 = out[kKB1];
  gradients.dcompress_k.w2 = out[kKW2];
  gradients.dcompress_k.b2 = out[kKB2];
  gradients.dcompress_v.pe = out[kVPe];
  gradients.dcompress_v.w1 = out[kVW1];
  gradients.dcompress_v.b1 = out[kVB1];
  gradients.dcompress_v.w2 = out[kVW2];
  gradients.dcompress_v.b2 = out[kVB2];
  return gradients;
}

static void TestVersionsAndErrors(void) {
  CHECK(nsa_api_version() == NSA_API_VERSION);
  CHECK(strcmp(nsa_version(), NSA_VERSION) == 0);
  CHECK_ERROR(nsa_group_health(NULL), NSA_INVALID_ARGUMENT, "group: null");
  nsa_config config = TestConfig();
  CHECK_OK(nsa_config_validate(&config));
  CHECK(strcmp(nsa_last_error(), "") == 0);
  /* Null is allowed where something is to be destroyed. */
  nsa_group_destroy(NULL);
  nsa_plan_destroy(NULL);
  nsa_engine_destroy(NULL);
  nsa_saved_forward_destroy(NULL);
  nsa_kv_cache_destroy(NULL);
}

/* A struct of a later version: one field more. */
typedef struct LaterConfig {
  nsa_config config;
  int64_t added;
} LaterConfig;

static void TestConfigs(void) {
  nsa_config config = TestConfig();
  CHECK(config.num_initial_blocks == 1 && config.softmax_scale == 0);
  config.num_q_heads = 3;
  config.head_dim_v = 100;
  config.compressor = 9;
  CHECK_ERROR(nsa_config_validate(&config), NSA_INVALID_ARGUMENT, "num_q_heads = 3");
  CHECK(strstr(nsa_last_error(), "head_dim_v = 100") != NULL);
  CHECK(strstr(nsa_last_error(), "compressor") != NULL);
  CHECK_ERROR(nsa_config_validate(NULL), NSA_INVALID_ARGUMENT, "config: null");

  const size_t wrong_sizes[] = {0, sizeof(size_t), sizeof(config) - 1, (size_t)1 << 40};
  for (int i = 0; i < 4; ++i) {
    config = TestConfig();
    config.struct_size = wrong_sizes[i];
    CHECK_ERROR(nsa_config_validate(&config), NSA_INVALID_ARGUMENT, "config.struct_size");
    CHECK_ERROR(nsa_config_init(&config), NSA_INVALID_ARGUMENT, "config.struct_size");
  }
  LaterConfig later = {TestConfig(), 0};
  later.config.struct_size = sizeof(later);
  CHECK_OK(nsa_config_validate(&later.config));
  later.added = 1;
  CHECK_ERROR(nsa_config_validate(&later.config), NSA_INVALID_ARGUMENT, "is set");

  config.struct_size = sizeof(config);
  CHECK_OK(nsa_config_from_text("num_q_heads: 16 softmax_scale: 0.5 compressor: LINEAR", &config));
  CHECK(config.num_q_heads == 16 && config.num_kv_heads == 4 && config.softmax_scale == 0.5f);
  CHECK(config.compressor == NSA_COMPRESSOR_LINEAR && config.struct_size == sizeof(config));
  CHECK_OK(nsa_config_from_text(" {\"window_tokens\": 7}", &config));
  CHECK(config.window_tokens == 7 && config.num_q_heads == 64);
  CHECK_ERROR(nsa_config_from_text("window_tokens: x", &config), NSA_INVALID_ARGUMENT, "1:16");
  CHECK_ERROR(nsa_config_from_text("{\"window_tokens\": 0}", &config), NSA_INVALID_ARGUMENT,
              "window_tokens = 0");
  CHECK_ERROR(nsa_config_from_text(NULL, &config), NSA_INVALID_ARGUMENT, "text: null");
}

static void TestPlans(void) {
  nsa_plan* plan = NULL;
  NSA_NEW(nsa_plan_options, options);
  CHECK_ERROR(nsa_plan_create(&options, &plan), NSA_INVALID_ARGUMENT, "num_tokens = 0");
  options.num_tokens = 20;
  options.num_ranks = 2;
  options.sharding = 4;
  CHECK_ERROR(nsa_plan_create(&options, &plan), NSA_INVALID_ARGUMENT, "sharding = 4");
  options.sharding = NSA_SHARDING_UNEVEN;
  CHECK_ERROR(nsa_plan_create(&options, &plan), NSA_INVALID_ARGUMENT, "tokens_of_rank");
  CHECK(plan == NULL);
  const int64_t lengths[] = {3, 17};
  options.tokens_of_rank = lengths;
  CHECK_OK(nsa_plan_create(&options, &plan));
  int64_t num_tokens = 0;
  CHECK_OK(nsa_plan_tokens_of_rank(plan, 1, &num_tokens));
  CHECK(num_tokens == 17);
  CHECK_ERROR(nsa_plan_tokens_of_rank(plan, 2, &num_tokens), NSA_INVALID_ARGUMENT, "rank = 2");
  nsa_plan_destroy(plan);

  /* Documents of 8, 0 and 12 tokens, each zig-zag over two ranks: parts of 2 and of 3. */
  const int64_t cu_seqlens[] = {0, 8, 8, 20};
  options.tokens_of_rank = NULL;
  options.num_tokens = 0;
  options.sharding = NSA_SHARDING_ZIGZAG_PER_DOCUMENT;
  options.cu_seqlens = cu_seqlens;
  CHECK_ERROR(nsa_plan_create(&options, &plan), NSA_INVALID_ARGUMENT, "num_cu_seqlens = 0");
  options.num_cu_seqlens = 4;
  CHECK_OK(nsa_plan_create(&options, &plan));
  int32_t num_ranks = 0, num_documents = 0;
  CHECK_OK(nsa_plan_size(plan, &num_tokens, &num_ranks, &num_documents));
  CHECK(num_tokens == 20 && num_ranks == 2 && num_documents == 2);
  static const int64_t kGlobal[] = {0, 1, 6, 7, 8, 9, 10, 17, 18, 19};
  static const int64_t kInDocument[] = {0, 1, 6, 7, 0, 1, 2, 9, 10, 11};
  static const int32_t kDocument[] = {0, 0, 0, 0, 1, 1, 1, 1, 1, 1};
  int64_t global[10], in_document[10];
  int32_t document[10];
  CHECK_OK(nsa_plan_tokens_of_rank(plan, 0, &num_tokens));
  CHECK(num_tokens == 10);
  CHECK_OK(nsa_plan_positions(plan, 0, global, in_document, document));
  CHECK(memcmp(global, kGlobal, sizeof(kGlobal)) == 0);
  CHECK(memcmp(in_document, kInDocument, sizeof(kInDocument)) == 0);
  CHECK(memcmp(document, kDocument, sizeof(kDocument)) == 0);
  CHECK_OK(nsa_plan_positions(plan, 1, global, NULL, NULL));
  CHECK(global[0] == 2 && global[9] == 16);
  const char* text = NULL;
  CHECK_OK(nsa_plan_text(plan, &text));
  CHECK(strstr(text, "chunks[0]: tokens [0, 2) on rank 0\n") != NULL);
  nsa_plan_destroy(plan);
}

static void TestGroups(void) {
  nsa_group* group = NULL;
  NSA_NEW(nsa_group_options, options);
  options.device = -2;
  CHECK_ERROR(nsa_group_create(&options, &group), NSA_INVALID_ARGUMENT, "device = -2");
  options.device = 1 << 20;
  CHECK_ERROR(nsa_group_create(&options, &group), NSA_INVALID_ARGUMENT, "device = 1048576");
  options.device = NSA_DEVICE_CPU;
  options.transport = NSA_TRANSPORT_NCCL;
  CHECK_ERROR(nsa_group_create(&options, &group), NSA_INVALID_ARGUMENT, "transport = 3");
  options.transport = NSA_TRANSPORT_AUTO;
  options.rank = 1;
  CHECK_ERROR(nsa_group_create(&options, &group), NSA_INVALID_ARGUMENT, "rank = 1");
  options.size = 2;
  CHECK_ERROR(nsa_group_create(&options, &group), NSA_INVALID_ARGUMENT, "rendezvous: null");
  const char* wrong[] = {"", "host", ":1", "::1:5", "host:x", "host:0"};
  for (int i = 0; i < 6; ++i) {
    options.rendezvous = wrong[i];
    CHECK_ERROR(nsa_group_create(&options, &group), NSA_INVALID_ARGUMENT,
                i < 5 ? "rendezvous = " : "master_port");
  }
  /* Rank 1 waits for a rank 0 that does not come. */
  const char* address = NULL;
  CHECK_OK(nsa_rendezvous_address("127.0.0.1", &address));
  CHECK(strncmp(address, "127.0.0.1:", 10) == 0);
  char rendezvous[64];
  snprintf(rendezvous, sizeof(rendezvous), "%s", address);
  options.rendezvous = rendezvous;
  options.timeout_ms = 100;
  CHECK_ERROR(nsa_group_create(&options, &group), NSA_DEADLINE_EXCEEDED, "rank 1 waited");
  options.from_environment = 1;
  CHECK_ERROR(nsa_group_create(&options, &group), NSA_INVALID_ARGUMENT, "from_environment");
  CHECK(group == NULL);
  CHECK_OK(nsa_rendezvous_address(NULL, &address));
  CHECK(strchr(address, ':') != NULL);

  group = TestGroup();
  int32_t rank = -1, size = -1;
  CHECK_OK(nsa_group_rank(group, &rank, &size));
  CHECK(rank == 0 && size == 1);
  CHECK_OK(nsa_group_barrier(group));
  CHECK_OK(nsa_group_health(group));
  CHECK_OK(nsa_group_abort(group, "enough"));
  CHECK_ERROR(nsa_group_barrier(group), NSA_ABORTED, "enough");
  CHECK_ERROR(nsa_group_health(group), NSA_ABORTED, "enough");
  nsa_group_destroy(group);
}

static nsa_engine* TestEngine(nsa_group* group, const nsa_config* config) {
  NSA_NEW(nsa_engine_options, options);
  options.dtype = NSA_F32;
  options.has_backward = 1;
  options.max_hidden_width = kHidden;
  nsa_plan* plan = TestPlan();
  nsa_engine* engine = NULL;
  CHECK_OK(nsa_engine_create(&options, config, plan, group, &engine));
  nsa_plan_destroy(plan);
  return engine;
}

static void TestEngineErrors(void) {
  nsa_group* group = TestGroup();
  nsa_plan* plan = TestPlan();
  nsa_config config = TestConfig();
  nsa_engine* engine = NULL;
  NSA_NEW(nsa_engine_options, options);
  CHECK_ERROR(nsa_engine_create(NULL, &config, plan, group, &engine), NSA_INVALID_ARGUMENT,
              "options: null");
  CHECK_ERROR(nsa_engine_create(&options, &config, NULL, group, &engine), NSA_INVALID_ARGUMENT,
              "plan: null");
  options.dtype = 3;
  CHECK_ERROR(nsa_engine_create(&options, &config, plan, group, &engine), NSA_INVALID_ARGUMENT,
              "dtype = 3");
  options.dtype = NSA_F32;
  options.fetch_budget_bytes = -1;
  CHECK_ERROR(nsa_engine_create(&options, &config, plan, group, &engine), NSA_INVALID_ARGUMENT,
              "fetch_budget_bytes");
  options.fetch_budget_bytes = 0;
  config.num_kv_heads = 3;
  CHECK_ERROR(nsa_engine_create(&options, &config, plan, group, &engine), NSA_INVALID_ARGUMENT,
              "num_q_heads = 4");
  CHECK(engine == NULL);
  /* No backward was asked for. */
  config = TestConfig();
  CHECK_OK(nsa_engine_create(&options, &config, plan, group, &engine));
  nsa_saved_forward* saved = NULL;
  CHECK_ERROR(nsa_saved_forward_create(engine, NULL, &saved), NSA_FAILED_PRECONDITION,
              "no backward");
  nsa_engine_destroy(engine);
  nsa_plan_destroy(plan);

  engine = TestEngine(group, &config);
  ExpectedRun run = NewRun();
  FillInputs(&run);
  nsa_forward_inputs inputs = ForwardInputs(run.inputs);
  NSA_NEW(nsa_forward_outputs, outputs);
  CHECK_ERROR(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
              "o.shape");
  outputs.o = run.o;
  CHECK_ERROR(nsa_engine_forward(engine, NULL, &outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
              "inputs: null");
  inputs.k_slc.dtype = NSA_BF16;
  CHECK_ERROR(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
              "k_slc");
  inputs.k_slc.dtype = 7;
  CHECK_ERROR(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
              "k_slc.dtype = 7");
  inputs = ForwardInputs(run.inputs);
  inputs.compress_v.w2.ndim = 5;
  CHECK_ERROR(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
              "compress_v.w2.ndim = 5");
  inputs = ForwardInputs(run.inputs);
  inputs.q.shape[0] -= 1;
  CHECK_ERROR(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL), NSA_INVALID_ARGUMENT, "q");
  inputs = ForwardInputs(run.inputs);
  inputs.gate.strides[2] = 2;
  CHECK_ERROR(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
              "gate");
  outputs.struct_size = 3;
  inputs = ForwardInputs(run.inputs);
  CHECK_ERROR(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL), NSA_INVALID_ARGUMENT,
              "outputs.struct_size = 3");
  /* The backward needs its forward. */
  CHECK_OK(nsa_saved_forward_create(engine, NULL, &saved));
  const nsa_gradients gradients = GradientsOf(run.gradients);
  CHECK_ERROR(nsa_engine_backward(engine, &inputs, &run.d_o, saved, &gradients, NULL),
              NSA_INVALID_ARGUMENT, "saved");
  CHECK_ERROR(nsa_engine_backward(engine, &inputs, &run.d_o, NULL, &gradients, NULL),
              NSA_INVALID_ARGUMENT, "saved: null");
  /* None of this has harmed the engine. */
  outputs.struct_size = sizeof(outputs);
  CHECK_OK(nsa_engine_forward(engine, &inputs, &outputs, saved, NULL));
  CHECK_ERROR(nsa_engine_backward(engine, &inputs, &run.d_o, saved, NULL, NULL),
              NSA_INVALID_ARGUMENT, "gradients: null");
  nsa_saved_forward_destroy(saved);
  nsa_engine_destroy(engine);
  nsa_group_destroy(group);
}

static int SameBytes(const nsa_tensor* a, const nsa_tensor* b) {
  return memcmp(a->data, b->data, NumElements(a) * 4) == 0;
}

static void TestValues(void) {
  ExpectedRun expected = NewRun();
  FillInputs(&expected);
  const nsa_config config = TestConfig();
  CHECK(RunCppEngine(&config, kCuSeqlens, kNumCuSeqlens, &expected));

  ExpectedRun run = NewRun();
  nsa_group* group = TestGroup();
  nsa_engine* engine = TestEngine(group, &config);
  nsa_group_destroy(group); /* the engine keeps it */
  const nsa_forward_inputs inputs = ForwardInputs(expected.inputs);
  NSA_NEW(nsa_forward_outputs, outputs);
  outputs.o = run.o;
  outputs.lse_cmp = run.lse[0];
  outputs.lse_slc = run.lse[1];
  outputs.lse_win = run.lse[2];
  outputs.block_indices = run.block_indices;
  nsa_tensor branches[3];
  for (int i = 0; i < 3; ++i) branches[i] = NewOutput();
  outputs.o_cmp = branches[0];
  outputs.o_slc = branches[1];
  outputs.o_win = branches[2];
  CHECK_OK(nsa_engine_forward(engine, &inputs, &outputs, NULL, NULL));
  CHECK(SameBytes(&run.o, &expected.o));
  for (int i = 0; i < 3; ++i) {
    CHECK(memcmp(run.lse[i], expected.lse[i], kNumTokens * kHq * 4) == 0);
  }
  CHECK(memcmp(run.block_indices, expected.block_indices, kNumTokens * kHkv * kTopN * 4) == 0);
  /* o is the gated sum of what was given as the branches. */
  const float* gate = expected.inputs[kGate].data;
  for (int64_t row = 0; row < kNumTokens * kHq; ++row) {
    float sum = 0;
    for (int i = 0; i < 3; ++i) sum += gate[row * 3 + i] * ((float*)branches[i].data)[row * kDv];
    CHECK(fabsf(sum - ((float*)run.o.data)[row * kDv]) < 1e-5f);
  }

  nsa_saved_forward* saved = NULL;
  NSA_NEW(nsa_save_options, save);
  save.keep_blocks = 1;
  CHECK_OK(nsa_saved_forward_create(engine, &save, &saved));
  int64_t num_bytes = 0;
  CHECK_OK(nsa_saved_forward_num_bytes(saved, &num_bytes));
  CHECK(num_bytes > 3 * kNumTokens * kHq * kDv * 4);
  NSA_NEW(nsa_forward_outputs, only_o);
  only_o.o = run.o;
  CHECK_OK(nsa_engine_forward(engine, &inputs, &only_o, saved, NULL));
  nsa_gradients gradients = GradientsOf(run.gradients);
  CHECK_OK(nsa_engine_backward(engine, &inputs, &expected.d_o, saved, &gradients, NULL));
  for (int i = 0; i < kNumInputs; ++i) CHECK(SameBytes(&run.gradients[i], &expected.gradients[i]));
  /* Once more on top: twice as much. */
  gradients.accumulate = 1;
  CHECK_OK(nsa_engine_backward(engine, &inputs, &expected.d_o, saved, &gradients, NULL));
  for (int i = 0; i < kNumInputs; ++i) {
    const float *twice = run.gradients[i].data, *once = expected.gradients[i].data;
    for (int64_t j = 0; j < NumElements(&run.gradients[i]); ++j) CHECK(twice[j] == 2 * once[j]);
  }

  const char* text = NULL;
  CHECK_OK(nsa_engine_stats(engine, &text));
  CHECK(strstr(text, "\"num_tokens\":\"300\"") != NULL);
  CHECK_OK(nsa_engine_gather_stats(engine, &text));
  CHECK(strncmp(text, "{\"ranks\":[{", 11) == 0);
  nsa_engine_destroy(engine); /* what was saved keeps it */
  CHECK_OK(nsa_saved_forward_num_bytes(saved, &num_bytes));
  nsa_saved_forward_destroy(saved);
}

static nsa_tensor Rows(const nsa_tensor* tensor, int64_t begin, int64_t count) {
  nsa_tensor rows = *tensor;
  rows.data = (float*)tensor->data + begin * tensor->strides[0];
  rows.shape[0] = count;
  return rows;
}

static nsa_kv_tokens KvRows(const nsa_tensor* in, int64_t begin, int64_t count) {
  const nsa_kv_tokens tokens = {Rows(&in[kKCmp], begin, count), Rows(&in[kVCmp], begin, count),
                                Rows(&in[kKSlc], begin, count), Rows(&in[kVSlc], begin, count),
                                Rows(&in[kKWin], begin, count), Rows(&in[kVWin], begin, count)};
  return tokens;
}

/* The last document's tokens, the last three of them decoded: what the forward gave for them. */
static void TestDecode(void) {
  enum { kBegin = 100, kLength = kNumTokens - kBegin, kNew = 3 };
  ExpectedRun run = NewRun();
  FillInputs(&run);
  nsa_config config = TestConfig();
  CHECK(RunCppEngine(&config, kCuSeqlens, kNumCuSeqlens, &run));
  nsa_forward_inputs inputs = ForwardInputs(run.inputs);

  nsa_group* group = TestGroup();
  nsa_kv_cache* cache = NULL;
  NSA_NEW(nsa_kv_cache_options, options);
  options.separate_kv = 1;
  options.compress_k = inputs.compress_k;
  options.compress_v = inputs.compress_v;
  options.num_pages = 32;
  options.dtype = -1;
  CHECK_ERROR(nsa_kv_cache_create(&options, &config, group, &cache), NSA_INVALID_ARGUMENT,
              "dtype = -1");
  options.dtype = NSA_F32;
  options.max_step_rows = -1;
  CHECK_ERROR(nsa_kv_cache_create(&options, &config, group, &cache), NSA_INVALID_ARGUMENT,
              "max_step_rows = -1");
  options.max_step_rows = 0;
  CHECK_OK(nsa_kv_cache_create(&options, &config, group, &cache));
  nsa_kv_cache* empty_cache = NULL;
  CHECK_OK(nsa_kv_cache_create(&options, &config, group, &empty_cache));
  int32_t is_reachable = 0;
  CHECK_OK(nsa_kv_cache_is_reachable(cache, &is_reachable));
  CHECK(is_reachable == 1);

  int64_t sequence = -1, forked = -1, empty = -1, num_tokens = -1;
  CHECK_ERROR(nsa_kv_cache_close(cache, 12345), NSA_NOT_FOUND, "12345");
  CHECK_OK(nsa_kv_cache_open(cache, &sequence));
  nsa_kv_tokens tokens = KvRows(run.inputs, kBegin, kLength - kNew);
  CHECK_OK(nsa_kv_cache_append(cache, sequence, &tokens, NULL));
  tokens.v_win.ndim = -1;
  CHECK_ERROR(nsa_kv_cache_append(cache, sequence, &tokens, NULL), NSA_INVALID_ARGUMENT,
              "v_win.ndim = -1");
  CHECK_OK(nsa_kv_cache_fork(cache, sequence, &forked));

  const int64_t first = kNumTokens - kNew;
  NSA_NEW(nsa_step_inputs, step);
  step.q = Rows(&run.inputs[kQ], first, kNew);
  step.gate = Rows(&run.inputs[kGate], first, kNew);
  step.kv = KvRows(run.inputs, first, kNew);
  NSA_NEW(nsa_step_outputs, outputs);
  nsa_tensor o = NewOutput();
  outputs.o = Rows(&o, 0, kNew);
  nsa_step_sequence batch = {sequence, kNew, 0};
  batch.reserved = 1;
  CHECK_ERROR(nsa_kv_cache_step(cache, &batch, 1, &step, &outputs, NULL), NSA_INVALID_ARGUMENT,
              "reserved");
  batch.reserved = 0;
  CHECK_ERROR(nsa_kv_cache_step(cache, NULL, 1, &step, &outputs, NULL), NSA_INVALID_ARGUMENT,
              "sequences: null");
  /* What nobody has planned does nothing. */
  CHECK_OK(nsa_kv_cache_open(empty_cache, &empty));
  CHECK_OK(nsa_kv_cache_run_step(empty_cache, kNew, &step, &outputs, NULL));
  CHECK_OK(nsa_kv_cache_num_tokens(empty_cache, empty, &num_tokens));
  CHECK(num_tokens == 0 && ((float*)o.data)[0] == 0);
  nsa_kv_cache_destroy(empty_cache);
  CHECK_OK(nsa_kv_cache_step(cache, &batch, 1, &step, &outputs, NULL));
  /* The same on the fork, as a plan and a run, and again after it is taken back. */
  nsa_tensor o2 = NewOutput();
  outputs.o = Rows(&o2, 0, kNew);
  batch.sequence = forked;
  for (int round = 0; round < 2; ++round) {
    CHECK_OK(nsa_kv_cache_plan_step(cache, &batch, 1, NULL));
    CHECK_OK(nsa_kv_cache_run_step(cache, kNew, &step, &outputs, NULL));
    CHECK_OK(nsa_kv_cache_num_tokens(cache, forked, &num_tokens));
    CHECK(num_tokens == kLength);
    for (int64_t i = 0; i < kNew * kHq * kDv; ++i) {
      const float expected = ((float*)run.o.data)[first * kHq * kDv + i];
      CHECK(fabsf(((float*)o.data)[i] - expected) < 1e-4f);
      CHECK(((float*)o2.data)[i] == ((float*)o.data)[i]);
    }
    memset(o2.data, 0, kNew * kHq * kDv * 4);
    CHECK_OK(nsa_kv_cache_truncate(cache, forked, kLength - kNew));
  }

  /* A forward's document is taken over as it is. */
  nsa_engine* engine = TestEngine(group, &config);
  NSA_NEW(nsa_forward_outputs, forward_outputs);
  forward_outputs.o = o2;
  CHECK_OK(nsa_engine_forward(engine, &inputs, &forward_outputs, NULL, NULL));
  int64_t taken = -1;
  CHECK_OK(nsa_kv_cache_open(cache, &taken));
  CHECK_OK(nsa_kv_cache_append_forward(cache, 0, taken, engine, &inputs, 1, NULL));
  CHECK_OK(nsa_kv_cache_num_tokens(cache, taken, &num_tokens));
  CHECK(num_tokens == kLength);
  /* Not that of an engine with blocks of another size. */
  nsa_engine_destroy(engine);
  config.select_block_tokens = 128;
  engine = TestEngine(group, &config);
  CHECK_OK(nsa_engine_forward(engine, &inputs, &forward_outputs, NULL, NULL));
  CHECK_OK(nsa_kv_cache_truncate(cache, taken, 0));
  CHECK_ERROR(nsa_kv_cache_append_forward(cache, 0, taken, engine, &inputs, 1, NULL),
              NSA_INVALID_ARGUMENT, "engine: its config must be the cache's");

  NSA_NEW(nsa_kv_cache_stats, stats);
  CHECK_OK(nsa_kv_cache_get_stats(cache, &stats));
  CHECK(stats.sequences == 3 && stats.steps == 3 && stats.pages == 32 && stats.pages_used > 0);
  CHECK(stats.struct_size == sizeof(stats) && stats.bytes_fetched == 0);
  CHECK_OK(nsa_kv_cache_close(cache, sequence));
  CHECK_ERROR(nsa_kv_cache_num_tokens(cache, sequence, &num_tokens), NSA_NOT_FOUND, "");
  nsa_group_destroy(group);
  nsa_engine_destroy(engine);
  nsa_kv_cache_destroy(cache);
}

int main(void) {
  TestVersionsAndErrors();
  TestConfigs();
  TestPlans();
  TestGroups();
  TestEngineErrors();
  TestValues();
  TestDecode();
  return 0;
}
