// The cache against a plain copy of every sequence and the fp64 reference: random schedules of
// appending, steps, rolling back, forking, closing and sharded forwards.
#ifndef TESTS_SERVING_SCHEDULE_H_
#define TESTS_SERVING_SCHEDULE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "tests/reference/reference.h"
#include "tests/testing/generate.h"

namespace nsa::test {

struct Variant {
  std::string name;
  DType dtype;
  bool shares_kv;
  bool is_reachable;  // what the communicator's windows are
  reference::CompressorKind compressor;
  int num_operations;
};

// Tokens that sequences are made of, in no order that matters.
struct Universe {
  explicit Universe(const Variant& variant);

  reference::ReferenceConfig config;
  InputOptions options;
  reference::ReferenceInputs inputs;
  EncodedInputs encoded;
};

struct ScheduleCounts {
  int64_t bytes_fetched = 0;  // by steps
  int64_t exhausted = 0;      // operations for which there was no room
};

// Collective: one rank of the schedule, whose failures are the current test's.
ScheduleCounts RunSchedule(const Variant& variant, const Universe& universe,
                           std::shared_ptr<comm::Communicator> communicator,
                           std::shared_ptr<kernels::Kernels> kernels);

}  // namespace nsa::test

#endif  // TESTS_SERVING_SCHEDULE_H_
