// What the handles of nsa/c_api.h hold. Each keeps alive what it needs of others.
#ifndef NSA_C_API_HANDLES_H_
#define NSA_C_API_HANDLES_H_

#include <memory>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/c_api.h"
#include "nsa/engine.h"
#include "nsa/passes/agreement.h"
#include "nsa/plan/sharding.h"
#include "nsa/serving/kv_cache.h"

struct nsa_group {
  std::shared_ptr<nsa::comm::Communicator> communicator;
  std::shared_ptr<nsa::kernels::Kernels> kernels;
};

struct nsa_plan {
  nsa::ShardPlan plan;
};

struct nsa_engine {
  std::shared_ptr<nsa::Engine> engine;
};

struct nsa_saved_forward {
  std::shared_ptr<nsa::Engine> engine;  // which `saved` must not outlive
  std::unique_ptr<nsa::SavedForward> saved;
};

struct nsa_kv_cache {
  std::unique_ptr<nsa::serving::KvCache> cache;
};

namespace nsa::c_api {

// For what is wrong before a collective call that begins with an agreement, as those that create
// do: the other ranks are in it, and fail likewise.
inline absl::Status FailTogether(const nsa_group& group, const absl::Status& status) {
  return Agree(*group.communicator, status, {});
}

}  // namespace nsa::c_api

#endif  // NSA_C_API_HANDLES_H_
