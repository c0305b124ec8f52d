/* Native Sparse Attention with context parallelism, for C and for whatever calls C: libnsa.so.
 *
 *   nsa_group* group;    which ranks, on what device
 *   nsa_plan* plan;      which rank holds which tokens
 *   nsa_engine* engine;  forward and backward
 *   nsa_kv_cache* cache; decoding
 *
 * A thin cover of the C++ interface, whose headers say what is computed and what may fail:
 * nsa/engine.h, nsa/config.h, nsa/plan/sharding.h, nsa/serving/kv_cache.h. (nsa/service.h, which
 * batches the requests of many callers, is C++ only.) Symbols in shapes: S tokens of the whole
 * sequence, P ranks, T tokens of this rank, Hq and Hkv heads of q and of k and v, Dk and Dv their
 * dimensions, l, d, l', n, w as in nsa_config.
 *
 * Memory. Tensors are views of the caller's memory, on the group's device, and are not copied. What
 * an argument points to is read during the call only, tensors' data apart: on a GPU a call enqueues
 * on `stream`, a cudaStream_t (null: the legacy default stream), and data must stay until that work
 * is done. On the CPU `stream` is ignored and calls have finished when they return.
 *
 * Handles. A create function writes a handle only when it returns NSA_OK; its destroy function
 * takes null too. Handles may be destroyed in any order: what one needs of another lives on. One
 * thread at a time calls with the handles of one group, any thread; nsa_group_abort and
 * nsa_group_health may be called beside it. "Collective": every rank of the group makes this call,
 * in the same order.
 *
 * Structs begin with struct_size = sizeof(the struct), by which a later library knows an older
 * caller. Set the rest to zero first: zero means the default where one is given, null "not wanted"
 * where that is allowed. A struct larger than the library's is taken when its tail is zero.
 * nsa_tensor, nsa_compressor_params, nsa_compressor_gradients, nsa_kv_tokens and nsa_step_sequence
 * stand inside others and never change.
 */
#ifndef NSA_C_API_H_
#define NSA_C_API_H_

#include <stddef.h>
#include <stdint.h>

#define NSA_API __attribute__((visibility("default")))

#define NSA_VERSION "0.1.0"
/* Grows with every addition to this file. */
#define NSA_API_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Errors ---------------------------------------------------------------------------------- */

/* Numbered as absl::StatusCode; those in use. */
typedef enum nsa_status {
  NSA_OK = 0,
  NSA_CANCELLED = 1,
  NSA_UNKNOWN = 2,
  NSA_INVALID_ARGUMENT = 3,  /* the caller's: names field, value and rule */
  NSA_DEADLINE_EXCEEDED = 4, /* a wait: names who waited for whom */
  NSA_NOT_FOUND = 5,
  NSA_ALREADY_EXISTS = 6,
  NSA_RESOURCE_EXHAUSTED = 8,  /* memory: names bytes asked and free */
  NSA_FAILED_PRECONDITION = 9, /* not in this state, or ranks in different calls */
  NSA_ABORTED = 10,            /* some rank aborted the group: names it and its reason */
  NSA_OUT_OF_RANGE = 11,
  NSA_UNIMPLEMENTED = 12,
  NSA_INTERNAL = 13,    /* ours or CUDA's: names what failed */
  NSA_UNAVAILABLE = 14, /* a rank that died, or a library that is not there: names it */
} nsa_status;

/* Of this thread's last call that returned a status: the error's text, or "" after NSA_OK. Valid
 * until this thread's next such call. */
NSA_API const char* nsa_last_error(void);

/* The NSA_VERSION and the NSA_API_VERSION that the library was built with. */
NSA_API const char* nsa_version(void);
NSA_API int32_t nsa_api_version(void);

/* Texts that functions give (const char** text) are the library's and stay valid until this
 * thread's next call that gives one. */

/* ---- Tensors --------------------------------------------------------------------------------- */

typedef enum nsa_dtype { NSA_F32 = 0, NSA_BF16 = 1, NSA_F16 = 2 } nsa_dtype;

/* A view. Unset when data is null, as optional ones may be; one without elements that is meant to
 * be set has any other address. The last dimension is contiguous; other strides are free, but on a
 * GPU every row of every head begins at a multiple of 16 bytes. */
typedef struct nsa_tensor {
  void* data;
  int32_t dtype; /* nsa_dtype */
  int32_t ndim;  /* 0 to 4 */
  int64_t shape[4];
  int64_t strides[4]; /* in elements */
} nsa_tensor;

/* ---- Groups ---------------------------------------------------------------------------------- */

typedef struct nsa_group nsa_group;

#define NSA_DEVICE_CPU (-1)

typedef enum nsa_transport {
  NSA_TRANSPORT_AUTO = 0,     /* nccl on GPUs; on CPUs loopback for one rank, else ucx */
  NSA_TRANSPORT_LOOPBACK = 1, /* CPU, one rank */
  NSA_TRANSPORT_UCX = 2,      /* CPU, or a GPU whose bytes then go through the host */
  NSA_TRANSPORT_NCCL = 3,     /* GPU of compute capability 9.0 or later */
} nsa_transport;

/* NCCL and UCX are opened when first used: NSA_UNAVAILABLE names the library that is not there. A
 * libnccl.so.2 that the process has already loaded is the one used. */
typedef struct nsa_group_options {
  size_t struct_size;
  /* Nonzero: rank, size and rendezvous come from the environment, as torchrun (RANK, WORLD_SIZE,
   * MASTER_ADDR, MASTER_PORT) or mpirun (OMPI_COMM_WORLD_RANK and _SIZE, with MASTER_ADDR and
   * MASTER_PORT) leave it (rank 0 listens near MASTER_PORT, not on it), and those below must be
   * zero; without any of these variables the group is of one rank. */
  int32_t from_environment;
  int32_t rank; /* in [0, size) */
  int32_t size; /* P; 0: 1 */
  /* NSA_DEVICE_CPU, or CUDA's number of this rank's GPU; the same kind on all ranks. */
  int32_t device;
  int32_t transport; /* nsa_transport, the same on all ranks */
  /* Of a rank on a CPU; 0: its share of the host's cores under torchrun or mpirun, else all. */
  int32_t num_threads;
  int64_t timeout_ms; /* of every wait for another rank; 0: 60000 */
  /* "host:port" of rank 0, "[address]:port" for IPv6: rank 0 listens there, or on one of the 15
   * ports after it if that is taken, while the group is made. Unused, may be null, for one rank. */
  const char* rendezvous;
  /* Ranks meet only ranks of the same name, which groups that are made at the same time with the
   * same rendezvous need; null: "". */
  const char* name;
  /* An ncclComm_t of the same ranks, made with blocking = 0, for the group's all-gathers and
   * exchanges instead of one of its own. It is taken: nobody else may use or destroy it from now
   * on, so a framework's own communicator does not qualify. Null: none. */
  void* nccl_comm;
} nsa_group_options;

/* Collective: the ranks meet at the rendezvous, which also tells them when one dies. */
NSA_API nsa_status nsa_group_create(const nsa_group_options* options, nsa_group** group);
/* The group ends with the last handle that needs it, which waits, for the timeout at most, for what
 * is under way. */
NSA_API void nsa_group_destroy(nsa_group* group);

/* For rank 0 of a group to be, which tells the others by its own means: "host:port" with a port
 * that is free now. `host`: a name or an address of this machine that the others know; null: the
 * first address of its interfaces that is not loopback, else 127.0.0.1. */
NSA_API nsa_status nsa_rendezvous_address(const char* host, const char** text);

/* Either may be null. */
NSA_API nsa_status nsa_group_rank(const nsa_group* group, int32_t* rank, int32_t* size);
/* Collective on the host: returns when all ranks have called it. */
NSA_API nsa_status nsa_group_barrier(nsa_group* group);
/* The error that broke the group, or NSA_OK. Never waits; on a GPU this is where errors of work
 * that was enqueued show. */
NSA_API nsa_status nsa_group_health(nsa_group* group);
/* Breaks the group on every rank: waits in progress and later calls return NSA_ABORTED with this
 * rank and `reason`, which may be null. Never waits. */
NSA_API nsa_status nsa_group_abort(nsa_group* group, const char* reason);

/* ---- Configuration --------------------------------------------------------------------------- */

typedef enum nsa_compressor {
  NSA_COMPRESSOR_MEAN = 0,
  NSA_COMPRESSOR_WEIGHTED = 1,
  NSA_COMPRESSOR_LINEAR = 2,
  NSA_COMPRESSOR_MLP = 3,
} nsa_compressor;

/* nsa::NsaConfig. Zero is a value here: begin with nsa_config_init or nsa_config_from_text. */
typedef struct nsa_config {
  size_t struct_size;
  int32_t num_q_heads;            /* Hq, a multiple of num_kv_heads; 64 */
  int32_t num_kv_heads;           /* Hkv; 4 */
  int32_t head_dim_qk;            /* Dk, one of 64, 128, 192, 256; 128 */
  int32_t head_dim_v;             /* Dv, likewise; 128 */
  int32_t compress_block_tokens;  /* l, a multiple of 16 and of d; 32 */
  int32_t compress_stride_tokens; /* d, a multiple of 16; 16 */
  int32_t select_block_tokens;    /* l', a multiple of d; 64 */
  int32_t num_selected_blocks;    /* n, the forced blocks counted in; 16 */
  int32_t num_initial_blocks;     /* forced first blocks; 1 */
  int32_t num_local_blocks;       /* forced last blocks up to the query's own; 2 */
  int32_t window_tokens;          /* w, the query's own token counted in; 512 */
  float softmax_scale;            /* 0: 1 / sqrt(Dk) */
  int32_t compressor;             /* nsa_compressor; NSA_COMPRESSOR_MEAN */
} nsa_config;

/* The defaults, in the fields that config->struct_size covers. */
NSA_API nsa_status nsa_config_init(nsa_config* config);
/* From JSON, when the text begins with "{", or text-proto (nsa/config.proto); a field left out is
 * the default. NSA_INVALID_ARGUMENT says where the text is wrong or lists all broken rules. */
NSA_API nsa_status nsa_config_from_text(const char* text, nsa_config* config);
/* NSA_INVALID_ARGUMENT with every broken rule as "field = value: rule", "; " between them. */
NSA_API nsa_status nsa_config_validate(const nsa_config* config);

/* ---- Plans ----------------------------------------------------------------------------------- */

/* How the tokens of one global sequence are dealt to the ranks: host data, needs no group. */
typedef struct nsa_plan nsa_plan;

typedef enum nsa_sharding {
  NSA_SHARDING_CONTIGUOUS = 0,
  /* Rank r holds parts r and 2P-1-r of 2P, as Megatron deals a sequence. */
  NSA_SHARDING_ZIGZAG = 1,
  /* The same inside each document, as Megatron (Transformer Engine) deals packed sequences. */
  NSA_SHARDING_ZIGZAG_PER_DOCUMENT = 2,
  NSA_SHARDING_UNEVEN = 3, /* rank r holds the next tokens_of_rank[r] tokens */
} nsa_sharding;

typedef struct nsa_plan_options {
  size_t struct_size;
  int64_t num_tokens; /* S; 0: the last of cu_seqlens */
  int32_t num_ranks;  /* P; 0: 1 */
  int32_t sharding;   /* nsa_sharding */
  /* 0, then each packed document's end, ascending, the last S; null: one document. Documents
   * without tokens are dropped. */
  const int64_t* cu_seqlens; /* [num_cu_seqlens] */
  int64_t num_cu_seqlens;
  const int64_t* tokens_of_rank; /* [P], for NSA_SHARDING_UNEVEN; else null */
} nsa_plan_options;

NSA_API nsa_status nsa_plan_create(const nsa_plan_options* options, nsa_plan** plan);
NSA_API void nsa_plan_destroy(nsa_plan* plan);

/* S, P and the number of documents with tokens; any may be null. */
NSA_API nsa_status nsa_plan_size(const nsa_plan* plan, int64_t* num_tokens, int32_t* num_ranks,
                                 int32_t* num_documents);
/* T of `rank`. */
NSA_API nsa_status nsa_plan_tokens_of_rank(const nsa_plan* plan, int32_t rank, int64_t* num_tokens);
/* Of each token of `rank`, in the order in which it holds them: its place in the global sequence,
 * its place in its document (as RoPE counts), its document. Each [T], or null. */
NSA_API nsa_status nsa_plan_positions(const nsa_plan* plan, int32_t rank, int64_t* global,
                                      int64_t* in_document, int32_t* document);
/* The plan for people to read, a "name: value" a line. */
NSA_API nsa_status nsa_plan_text(const nsa_plan* plan, const char** text);

/* ---- Engine ---------------------------------------------------------------------------------- */

typedef struct nsa_engine nsa_engine;

typedef struct nsa_engine_options {
  size_t struct_size;
  int32_t dtype;              /* nsa_dtype of q, k, v and o; NSA_F32 on the CPU only */
  int32_t has_backward;       /* nonzero: take the memory of the backward as well */
  int64_t fetch_budget_bytes; /* at most, for fetched blocks; 0: 1 GiB */
  int64_t max_hidden_width;   /* of the MLP compressors that the backward may be given, largest F */
  /* Nonzero: compare the ranks' arguments only in the first call and where this rank's have changed
   * in more than their data (C++: agree_in_every_call = false). */
  int32_t agree_on_change_only;
  int32_t time_stages; /* nonzero: measure when each stage ran, for the statistics */
  /* An engine of the same group whose calls' memory this one uses as well, taking more only if it
   * needs more: for plans that change from step to step. Their calls run in the order they are made
   * in, none beside the launch of a graph of another's. Null: memory of its own. */
  const nsa_engine* memory_of;
} nsa_engine_options;

/* Collective. Takes all memory that later calls use. The plan is copied. */
NSA_API nsa_status nsa_engine_create(const nsa_engine_options* options, const nsa_config* config,
                                     const nsa_plan* plan, nsa_group* group, nsa_engine** engine);
NSA_API void nsa_engine_destroy(nsa_engine* engine);

/* Learned parameters of one compressor; those that it has none of stay unset. H' is 1 or Hkv, D is
 * Dk for k and Dv for v, F any width. All in one dtype, NSA_F32 or the engine's. */
typedef struct nsa_compressor_params {
  nsa_tensor weight; /* [H',l]     WEIGHTED */
  nsa_tensor pe;     /* [H',l,D]   WEIGHTED, LINEAR, MLP; optional */
  nsa_tensor w;      /* [H',D,l*D] LINEAR */
  nsa_tensor w1;     /* [H',F,l*D] MLP */
  nsa_tensor b1;     /* [H',F]     MLP */
  nsa_tensor w2;     /* [H',D,F]   MLP */
  nsa_tensor b2;     /* [H',D]     MLP */
} nsa_compressor_params;

/* In the engine's dtype unless said. Branches may be given the same k and v. */
typedef struct nsa_forward_inputs {
  size_t struct_size;
  nsa_tensor q;     /* [T,Hq,Dk] */
  nsa_tensor k_cmp; /* [T,Hkv,Dk] */
  nsa_tensor v_cmp; /* [T,Hkv,Dv] */
  nsa_tensor k_slc; /* [T,Hkv,Dk] */
  nsa_tensor v_slc; /* [T,Hkv,Dv] */
  nsa_tensor k_win; /* [T,Hkv,Dk] */
  nsa_tensor v_win; /* [T,Hkv,Dv] */
  nsa_tensor gate;  /* [T,Hq,3] f32 or the engine's, after its sigmoid, order (cmp, slc, win) */
  nsa_compressor_params compress_k;
  nsa_compressor_params compress_v;
} nsa_forward_inputs;

/* All but o are optional. Contents are undefined after an error. */
typedef struct nsa_forward_outputs {
  size_t struct_size;
  nsa_tensor o;           /* [T,Hq,Dv] the engine's dtype */
  nsa_tensor o_cmp;       /* [T,Hq,Dv] likewise */
  nsa_tensor o_slc;       /* [T,Hq,Dv] */
  nsa_tensor o_win;       /* [T,Hq,Dv] */
  float* lse_cmp;         /* [T,Hq] dense, natural log, -inf without a key */
  float* lse_slc;         /* [T,Hq] */
  float* lse_win;         /* [T,Hq] */
  int32_t* block_indices; /* [T,Hkv,n] dense, in the query's document, -1 padded */
} nsa_forward_outputs;

/* What a forward leaves for its backward: any number of forwards may wait for theirs. */
typedef struct nsa_saved_forward nsa_saved_forward;

typedef struct nsa_save_options {
  size_t struct_size;
  int32_t drop_summaries; /* nonzero: the backward makes and gathers the summaries again */
  int32_t keep_blocks;    /* nonzero: keep what the forward fetches, else the backward does again */
  /* The caller's: nsa_engine_saved_bytes() of the group's device, 64-byte aligned, for as long as
   * the handle. Null: memory of its own. */
  void* memory;
  /* Nonzero: `memory` holds, also as a copy, what a forward of this engine left through another
   * handle. */
  int32_t is_filled;
} nsa_save_options;

/* What a forward leaves on this rank, in bytes; `options` may be null. 0 without has_backward. */
NSA_API nsa_status nsa_engine_saved_bytes(const nsa_engine* engine, const nsa_save_options* options,
                                          int64_t* num_bytes);
/* Collective unless options->memory is given. `options` may be null. NSA_FAILED_PRECONDITION
 * without has_backward. */
NSA_API nsa_status nsa_saved_forward_create(nsa_engine* engine, const nsa_save_options* options,
                                            nsa_saved_forward** saved);
NSA_API void nsa_saved_forward_destroy(nsa_saved_forward* saved);
NSA_API nsa_status nsa_saved_forward_num_bytes(const nsa_saved_forward* saved, int64_t* num_bytes);

/* Collective. `saved`: of this engine, filled for a backward, the optional outputs then unset; or
 * null. NSA_INVALID_ARGUMENT on every rank when any rank's tensors are wrong; the group goes on
 * then. Any other error breaks the group. May be captured in a CUDA graph. */
NSA_API nsa_status nsa_engine_forward(nsa_engine* engine, const nsa_forward_inputs* inputs,
                                      const nsa_forward_outputs* outputs, nsa_saved_forward* saved,
                                      void* stream);

/* In the shapes of nsa_compressor_params, f32, dense; unset: not wanted. */
typedef struct nsa_compressor_gradients {
  nsa_tensor weight;
  nsa_tensor pe;
  nsa_tensor w;
  nsa_tensor w1;
  nsa_tensor b1;
  nsa_tensor w2;
  nsa_tensor b2;
} nsa_compressor_gradients;

/* f32 or the engine's dtype each; unset: not wanted. Branches that share k and v share these as
 * well, which get the sum. */
typedef struct nsa_gradients {
  size_t struct_size;
  nsa_tensor dq;     /* [T,Hq,Dk] */
  nsa_tensor dk_cmp; /* [T,Hkv,Dk] */
  nsa_tensor dv_cmp; /* [T,Hkv,Dv] */
  nsa_tensor dk_slc; /* [T,Hkv,Dk] */
  nsa_tensor dv_slc; /* [T,Hkv,Dv] */
  nsa_tensor dk_win; /* [T,Hkv,Dk] */
  nsa_tensor dv_win; /* [T,Hkv,Dv] */
  nsa_tensor dgate;  /* [T,Hq,3] */
  nsa_compressor_gradients dcompress_k;
  nsa_compressor_gradients dcompress_v;
  int32_t accumulate; /* nonzero: add to what the tensors hold, else overwrite it */
  int32_t
      sum_over_ranks; /* nonzero: dcompress_* of all ranks' tokens, else of this rank's blocks */
} nsa_gradients;

/* Collective. The gradients of sum(o * d_o) of the forward that filled `saved` last, which must
 * have had the same inputs. d_o: [T,Hq,Dv] in the engine's dtype. Errors as for the forward. */
NSA_API nsa_status nsa_engine_backward(nsa_engine* engine, const nsa_forward_inputs* inputs,
                                       const nsa_tensor* d_o, nsa_saved_forward* saved,
                                       const nsa_gradients* gradients, void* stream);

/* What the last call moved and took, as JSON of nsa.RankStats (nsa/stats.proto), whose 64-bit
 * numbers are strings, as protobuf writes them. Waits for the call's end. NSA_FAILED_PRECONDITION
 * before the first call, and when another engine was called in the same memory since. */
NSA_API nsa_status nsa_engine_stats(nsa_engine* engine, const char** text);
/* Collective: the same of all ranks, nsa.ForwardStats. */
NSA_API nsa_status nsa_engine_gather_stats(nsa_engine* engine, const char** text);

/* ---- Decoding -------------------------------------------------------------------------------- */

/* Keys and values of sequences, in pages on all ranks. Each sequence has a home, the rank that
 * opened it and decodes it. An error leaves every sequence as it was. */
typedef struct nsa_kv_cache nsa_kv_cache;

typedef struct nsa_kv_cache_options {
  size_t struct_size;
  int32_t dtype;             /* nsa_dtype of q, k, v and o */
  int32_t max_sequences;     /* that this rank is home of; 0: 64 */
  int64_t num_pages;         /* of l' tokens each, of this rank's memory, for all homes together */
  const double* home_shares; /* [P] what part of the pages each home gets; null: equal parts */
  int64_t max_tokens;        /* of a sequence; 0: 2^20 */
  int64_t summary_tokens;    /* that the summaries hold; 0: as many as the pages of this home */
  int32_t max_step_rows;     /* new tokens of all sequences in a step; 0: 64 */
  int32_t separate_kv;       /* nonzero: branches have k and v of their own (C++: !shares_kv) */
  int64_t max_rollback_tokens; /* see nsa/serving/kv_cache.h; 0: 64 */
  /* Their data must outlive the cache. */
  nsa_compressor_params compress_k;
  nsa_compressor_params compress_v;
} nsa_kv_cache_options;

/* Collective. */
NSA_API nsa_status nsa_kv_cache_create(const nsa_kv_cache_options* options,
                                       const nsa_config* config, nsa_group* group,
                                       nsa_kv_cache** cache);
NSA_API void nsa_kv_cache_destroy(nsa_kv_cache* cache);

/* 1: kernels load the pages of every rank in place. 0: nsa_kv_cache_step and _run_step are
 * collective; a rank without sequences passes none. */
NSA_API nsa_status nsa_kv_cache_is_reachable(const nsa_kv_cache* cache, int32_t* is_reachable);

/* New tokens; without separate_kv only k_slc and v_slc are read. */
typedef struct nsa_kv_tokens {
  nsa_tensor k_cmp; /* [T,Hkv,Dk] */
  nsa_tensor v_cmp; /* [T,Hkv,Dv] */
  nsa_tensor k_slc; /* [T,Hkv,Dk] */
  nsa_tensor v_slc; /* [T,Hkv,Dv] */
  nsa_tensor k_win; /* [T,Hkv,Dk] */
  nsa_tensor v_win; /* [T,Hkv,Dv] */
} nsa_kv_tokens;

/* An empty sequence, whose home is this rank; its number is never used again. */
NSA_API nsa_status nsa_kv_cache_open(nsa_kv_cache* cache, int64_t* sequence);
NSA_API nsa_status nsa_kv_cache_num_tokens(const nsa_kv_cache* cache, int64_t sequence,
                                           int64_t* num_tokens);
/* T >= 1 tokens, which attend to nothing. */
NSA_API nsa_status nsa_kv_cache_append(nsa_kv_cache* cache, int64_t sequence,
                                       const nsa_kv_tokens* tokens, void* stream);
/* Collective: to an empty sequence of rank `home` (others pass any `sequence`) the tokens of one
 * document of the last forward of `engine`, which had these `inputs`, of the same config and group.
 */
NSA_API nsa_status nsa_kv_cache_append_forward(nsa_kv_cache* cache, int32_t home, int64_t sequence,
                                               nsa_engine* engine, const nsa_forward_inputs* inputs,
                                               int32_t document, void* stream);
/* Takes back all tokens from `num_tokens` on. */
NSA_API nsa_status nsa_kv_cache_truncate(nsa_kv_cache* cache, int64_t sequence, int64_t num_tokens);
/* A sequence with the same tokens, which shares pages until one of the two writes to them. */
NSA_API nsa_status nsa_kv_cache_fork(nsa_kv_cache* cache, int64_t sequence, int64_t* forked);
NSA_API nsa_status nsa_kv_cache_close(nsa_kv_cache* cache, int64_t sequence);

typedef struct nsa_step_sequence {
  int64_t sequence;
  int32_t num_new; /* tokens, 1 to 64 */
  int32_t reserved;
} nsa_step_sequence;

/* Rows are the new tokens of all sequences of the step, in their order, R in number. */
typedef struct nsa_step_inputs {
  size_t struct_size;
  nsa_tensor q;     /* [R,Hq,Dk] */
  nsa_kv_tokens kv; /* [R,...] */
  nsa_tensor gate;  /* [R,Hq,3] f32 or the cache's dtype */
} nsa_step_inputs;

typedef struct nsa_step_outputs {
  size_t struct_size;
  nsa_tensor o;           /* [R,Hq,Dv] the cache's dtype */
  int32_t* block_indices; /* [R,Hkv,n] dense, -1 padded; optional */
} nsa_step_outputs;

/* Appends each sequence's new tokens and attends with them: a plan_step and a run_step. */
NSA_API nsa_status nsa_kv_cache_step(nsa_kv_cache* cache, const nsa_step_sequence* sequences,
                                     int32_t num_sequences, const nsa_step_inputs* inputs,
                                     const nsa_step_outputs* outputs, void* stream);
/* Takes pages and uploads what the kernels need to know. Local. No other call of the cache comes
 * before its run_step, or runs beside the launch of a graph of that. */
NSA_API nsa_status nsa_kv_cache_plan_step(nsa_kv_cache* cache, const nsa_step_sequence* sequences,
                                          int32_t num_sequences, void* stream);
/* Only enqueues, and may be captured in a CUDA graph where the cache is reachable: the graph then
 * serves every later step of as many rows or fewer, launched after its own plan_step. The tensors
 * have `num_rows` rows, at least those of the plan. An error leaves the tokens that plan_step has
 * added, for nsa_kv_cache_truncate. */
NSA_API nsa_status nsa_kv_cache_run_step(nsa_kv_cache* cache, int64_t num_rows,
                                         const nsa_step_inputs* inputs,
                                         const nsa_step_outputs* outputs, void* stream);

/* Of this home. */
typedef struct nsa_kv_cache_stats {
  size_t struct_size;
  int64_t sequences;
  int64_t pages; /* on all ranks */
  int64_t pages_used;
  int64_t summary_pages;
  int64_t summary_pages_used;
  int64_t steps;
  int64_t tokens_appended;
  int64_t bytes_fetched; /* by steps, from other ranks; 0 where pages are read in place */
} nsa_kv_cache_stats;

/* Fills the fields that stats->struct_size covers. */
NSA_API nsa_status nsa_kv_cache_get_stats(const nsa_kv_cache* cache, nsa_kv_cache_stats* stats);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* NSA_C_API_H_ */
