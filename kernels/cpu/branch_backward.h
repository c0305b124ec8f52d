// The part that the backwards of the three branches share: queries of one kv head against a tile of
// keys.
//
// A branch has two kinds of items: queries that walk tiles of keys make dq, and keys that walk runs
// of queries make dk and dv. No two items write to the same place and every sum has one order,
// whatever the threads do; P and dS, which both kinds need, are computed twice for it.
#ifndef KERNELS_CPU_BRANCH_BACKWARD_H_
#define KERNELS_CPU_BRANCH_BACKWARD_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile_ops.h"
#include "kernels/cpu/workers.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

// Rows of work that an item of queries has at most, about.
constexpr int64_t kBackwardRows = 128;
// Queries that an item of keys adds up before they enter its sums: fixed, for the sake of the bits.
int64_t QueriesPerSum(const AttentionDims& dims);

// Row i * G + g is query i of an item, head g of the group.
struct BranchScratch {
  // `queries` of an item at most.
  BranchScratch(const AttentionDims& dims, int64_t queries, char* memory)
      : BranchScratch(dims, queries, Carver(memory)) {}

  float* q;              // [rows,Dk]
  float* d_o;            // [rows,Dv]
  RowOutputs* outputs;   // [rows]
  VisibleKeys* visible;  // [rows]
  float* p;              // [rows,kTileKeys] gate * P
  float* ds;             // [rows,kTileKeys] scale * dS
  float* dq;             // [rows,Dk] items of queries
  float* dk;             // [kTileKeys,Dk] items of keys
  float* dv;             // [kTileKeys,Dv] items of keys
  float* keys;           // [Dk,kTileKeys] a column is a key
  float* values;         // [Dv,kTileKeys] a column is a value
  float* key_panels;     // [Dk/kTileKeys,kTileKeys,kTileKeys] a row of a panel is a part of a key
  const void** tokens;   // [kTileKeys] addresses of a tile's tokens
  float** gradients;     // [kTileKeys] and of their gradients
  int64_t num_bytes;

 private:
  BranchScratch(const AttentionDims& dims, int64_t queries, Carver carver);
};

class BranchItem {
 public:
  BranchItem(const AttentionDims& dims, const Queries& queries, const OutputGradients& outputs,
             int32_t kv_head, const BranchScratch& scratch);

  // Rows from that of query `first_query` of the item on.
  void LoadQueries(const QueryRun& run, int64_t first_query = 0);

  // Addresses of a tile's keys or values, null where there is none. Both make `width` columns,
  // count rounded up to kLanes.
  void LoadKeys(const void* const* tokens, int32_t count);
  void LoadValues(const void* const* tokens, int32_t count);
  // Of K of a record [Dk,key_stride], whose columns are keys already.
  void LoadKeyColumns(const void* columns, int64_t key_stride, int32_t count);

  // An item of queries: StartQueries, then for each tile, when it is loaded, MakeKeyPanels and
  // AddToQueries, with row row_begin + i seeing scratch.visible[i], then StoreQueries.
  void StartQueries(const QueryRun& run);
  void MakeKeyPanels();
  void AddToQueries(int64_t row_begin, int64_t num_rows);
  void StoreQueries(const QueryRun& run, const QueryGradients& gradients);

  // An item of keys: StartKeys when they are loaded, then for each run, when it is loaded,
  // AddToKeys, with row i seeing scratch.visible[i]. The sums are in scratch.dk and scratch.dv.
  void StartKeys();
  void AddToKeys(int64_t num_rows);

 private:
  // p and ds of rows [row_begin, row_begin + num_rows).
  void ComputeTile(int64_t row_begin, int64_t num_rows);

  const AttentionDims& dims_;
  const Queries& queries_;
  const OutputGradients& outputs_;
  const int32_t kv_head_;
  const BranchScratch& s_;
  int32_t width_ = 0;
};

// All items of a branch over all queries: those of `keys`, then those of queries, of every kv head.
// An Item is made of (params, kv head, scratch) and has RunKeys and RunQueries.
template <class Item, class Params, class KeyRun>
absl::Status RunBranchItems(const Params& params, const std::vector<KeyRun>& keys,
                            Workers& workers) {
  const AttentionDims& dims = params.dims;
  const HeadRange& heads = params.queries.kv_heads;
  const int64_t queries_per_run = QueriesPerRun(params.queries, dims, params.queries.num_tokens,
                                                kBackwardRows, workers.num_threads());
  const std::vector<QueryRun> queries =
      SplitQueries(params.queries, 0, params.queries.num_tokens, queries_per_run);
  const int64_t num_key_items = static_cast<int64_t>(keys.size()) * heads.size();
  const int64_t num_query_items = static_cast<int64_t>(queries.size()) * heads.size();
  const int64_t scratch_bytes = BranchScratch(dims, queries_per_run, nullptr).num_bytes;
  return workers.Run(
      num_key_items + num_query_items, scratch_bytes, [&](int64_t item, char* memory) {
        const BranchScratch scratch(dims, queries_per_run, memory);
        Item work(params, heads.begin + static_cast<int32_t>(item % heads.size()), scratch);
        if (item < num_key_items) {
          work.RunKeys(keys[item / heads.size()]);
        } else {
          work.RunQueries(queries[(item - num_key_items) / heads.size()]);
        }
      });
}

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_BRANCH_BACKWARD_H_
