// Prints a line for each GPU that the programs of this build use by default, none when they compute
// on CPUs; why that is goes to stderr.
#include <cstdio>

#include "tools/launch/gpus.h"

int main() {
  const auto gpus = nsa::tools::FindGpus();
  if (!gpus.ok()) {
    std::fprintf(stderr, "list_gpus: %s\n", std::string(gpus.status().message()).c_str());
    return 0;
  }
  for (int gpu = 0; gpu < (*gpus)->count(); ++gpu) {
    std::printf("%d %s\n", gpu, (*gpus)->NameOf(gpu).c_str());
  }
  return 0;
}
