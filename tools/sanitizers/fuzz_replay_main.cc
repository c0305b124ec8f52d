// main() of a fuzz target where libFuzzer is not linked: runs every input of the corpus, and a
// fixed sequence of random ones, so that `bazel test //...` keeps what fuzzing once found.
// Arguments: files and folders of inputs; flags are libFuzzer's and ignored.

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void Run(const std::vector<uint8_t>& input) { LLVMFuzzerTestOneInput(input.data(), input.size()); }

void RunFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  Run(std::vector<uint8_t>(std::istreambuf_iterator<char>(in), {}));
}

}  // namespace

int main(int argc, char** argv) {
  int num_files = 0;
  for (int i = 1; i < argc; ++i) {
    if (argv[i][0] == '-') continue;
    if (!std::filesystem::is_directory(argv[i])) {
      RunFile(argv[i]);
      ++num_files;
      continue;
    }
    for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[i])) {
      if (!entry.is_regular_file()) continue;
      RunFile(entry.path());
      ++num_files;
    }
  }
  constexpr int kNumRandom = 2000;
  std::mt19937 rng(1);
  for (int i = 0; i < kNumRandom; ++i) {
    std::vector<uint8_t> input(rng() % 256);
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(rng());
    Run(input);
  }
  std::printf("%d inputs of the corpus and %d random ones\n", num_files, kNumRandom);
  return 0;
}
