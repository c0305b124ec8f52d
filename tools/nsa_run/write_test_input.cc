// write_test_input FOLDER: the files in.safetensors and config.json for nsa_run_test.sh.

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "google/protobuf/util/json_util.h"
#include "nsa/config.h"
#include "tools/files/files.h"
#include "tools/nsa_run/input_testlib.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::string folder = argv[1];
  const nsa::test::Problem problem =
      nsa::tools::SmallProblem(nsa::reference::CompressorKind::kLinear, nsa::DType::kBF16);
  absl::Status status = nsa::tools::WriteEntries(
      nsa::tools::InputEntries(problem, /*shared_kv=*/false), folder + "/in.safetensors");
  if (status.ok()) {
    std::string json;
    const auto converted =
        google::protobuf::util::MessageToJsonString(nsa::ToProto(problem.config), &json);
    status = converted.ok() ? nsa::tools::WriteFile(folder + "/config.json", json)
                            : absl::InternalError(converted.ToString());
  }
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return 1;
}
