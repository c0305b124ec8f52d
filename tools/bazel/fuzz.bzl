"""cc_fuzz_test: a libFuzzer target that is an ordinary test as well."""

load("@rules_cc//cc:defs.bzl", "cc_test")

def cc_fuzz_test(name, srcs, deps = [], corpus = None, tags = [], **kwargs):
    """A test of `LLVMFuzzerTestOneInput`.

    `bazel test` replays the corpus and a fixed sequence of random inputs; with --config=fuzz,
    libFuzzer runs briefly instead. To fuzz for long, keeping what it finds in the source tree:
      bazel build --config=fuzz //tests/fuzz:x
      bazel-bin/tests/fuzz/x -max_total_time=600 tests/fuzz/x_corpus

    Args:
      name: of the test.
      srcs: define `extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t)`.
      deps: of the test.
      corpus: a folder of this package with one input a file.
      tags: further tags.
      **kwargs: of cc_test.
    """
    cc_test(
        name = name,
        srcs = srcs,
        args = ["-runs=20000"] + ([native.package_name() + "/" + corpus] if corpus else []),
        data = native.glob([corpus + "/**"]) if corpus else [],
        linkopts = select({
            "@nsa//tools/sanitizers:fuzz": ["-fsanitize=fuzzer"],
            "//conditions:default": [],
        }),
        tags = tags + ["fuzz"],
        deps = deps + ["@nsa//tools/sanitizers:runtime"] + select({
            "@nsa//tools/sanitizers:fuzz": [],
            "//conditions:default": ["@nsa//tools/sanitizers:fuzz_replay_main"],
        }),
        **kwargs
    )
