// What the handles of nsa/c_api.h hold. Each keeps alive what it needs of others.
#ifndef NSA_C_API_HANDLES_H_
#define NSA_C_API_HANDLES_H_

#include <memory>

#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/c_api.h"
#include "nsa/engine.h"
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

#endif  // NSA_C_API_HANDLES_H_
