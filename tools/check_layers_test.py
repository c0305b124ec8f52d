"""Each rule of check_layers fails on what it forbids, at the right line, and passes what it allows."""

import os
import re
import tempfile
import unittest

from tools import check_layers


def violations(files):
    """{(path, line, rule)} of a tree with these files."""
    with tempfile.TemporaryDirectory() as root:
        for path, text in files.items():
            full = os.path.join(root, path)
            os.makedirs(os.path.dirname(full), exist_ok=True)
            with open(full, "w", encoding="utf-8") as out:
                out.write(text)
        found, _ = check_layers.check_tree(root)
    matches = [re.match(r"(.*):(\d+): \[(.*?)\] ", line) for line in found]
    return {(m.group(1), int(m.group(2)), m.group(3)) for m in matches}


class CheckLayersTest(unittest.TestCase):

    def expect(self, path, text, *expected):
        """`expected` are (line, rule) pairs."""
        self.assertEqual(violations({path: text}), {(path, *pair) for pair in expected})

    def test_layers(self):
        self.expect("comm/a.h", '\n#include "nsa/config.h"\n', (2, "layers"))
        self.expect("comm/a.cc", '#include "kernels/kernels.h"\n', (1, "layers"))
        self.expect("kernels/cuda/a.cu", '#include "comm/window.h"\n', (1, "layers"))
        self.expect("kernels/a.h", '#  include  <nsa/config.h>\n', (1, "layers"))
        self.expect("nsa/a.cc", '#include "tests/reference/forward.h"\n', (1, "layers"))
        self.expect("comm/BUILD.bazel", 'cc_library(\n  name = "a",\n  deps = ["//nsa:config"],\n)\n',
                    (3, "layers"))
        self.expect("kernels/BUILD", 'cc_test(name = "a_test", deps = ["@nsa//comm"])', (1, "layers"))

    def test_layers_allowed(self):
        self.expect("nsa/a.cc", '#include "comm/communicator.h"\n#include "kernels/kernels.h"\n')
        self.expect("kernels/cpu/a_test.cc", '#include "tests/reference/forward.h"\n')
        self.expect("tests/a.cc", '#include "comm/loopback/a.h"\n#include "nsa/engine.h"\n')
        self.expect("comm/a.cc", '// #include "nsa/config.h"\n/*\n#include "nsa/config.h"\n*/\n')
        self.expect("comm/BUILD.bazel",
                    'load("//nsa:x.bzl", "x")\n'
                    'cc_library(name = "a", visibility = ["//nsa:__subpackages__"])\n'
                    'cc_library(name = "b", testonly = True, deps = ["//tests/testing"])\n')

    def test_backends(self):
        self.expect("nsa/passes/a.cc", '#include "comm/nccl/communicator.h"\n', (1, "backends"))
        self.expect("nsa/a.h", '#include "kernels/cpu/kernels.h"\n', (1, "backends"))
        self.expect("nsa/BUILD.bazel", 'cc_library(name = "a", deps = ["//comm/loopback"])',
                    (1, "backends"))
        self.expect("nsa/a_test.cc", '#include "comm/loopback/a.h"\n#include "kernels/cpu/a.h"\n')
        self.expect("nsa/BUILD.bazel", 'cc_test(name = "a", deps = ["//comm/loopback"])')
        # What chooses among backends for callers in C, and asks the environment for them.
        self.expect("nsa/c_api/a.cc", '#include "comm/nccl/a.h"\nconst char* a = getenv("A");\n')
        self.expect("nsa/c_api/a.cc", "#include <nccl.h>\n", (1, "transport"))
        self.expect("nsa/c_apis/a.cc", '#include "comm/nccl/a.h"\n', (1, "backends"))

    def test_transport(self):
        self.expect("comm/ucx/a.cc", "#include <nccl.h>\n", (1, "transport"))
        self.expect("tests/a.cu", "#include <nccl_device.h>\n", (1, "transport"))
        self.expect("comm/nccl/a.cc", "#include <ucp/api/ucp.h>\n", (1, "transport"))
        self.expect("comm/a.cc", "#include <ucs/type/status.h>\n", (1, "transport"))
        self.expect("benchmarks/a.cc", "#include <mpi.h>\n", (1, "transport"))
        self.expect("nsa/BUILD.bazel", 'cc_library(name = "a", deps = ["@nccl//:nccl"])',
                    (1, "transport"))
        self.expect("comm/BUILD.bazel", 'cc_library(name = "a", deps = ["@openucx//:ucp"])',
                    (1, "transport"))
        self.expect("examples/BUILD.bazel", 'cc_binary(name = "a", deps = ["@openmpi//:mpi"])',
                    (1, "transport"))
        self.expect("comm/nccl/a.cc", "#include <nccl.h>\n#include <cuda_runtime.h>\n")
        self.expect("comm/ucx/BUILD.bazel", 'cc_library(name = "a", deps = ["@openucx//:ucp"])')
        self.expect("comm/bootstrap/a.cc", "#include <mpi.h>\n")

    def test_cuda(self):
        self.expect("nsa/a.cc", "#include <cuda_runtime.h>\n", (1, "cuda"))
        self.expect("kernels/cpu/a.cc", "#include <cuda_bf16.h>\n", (1, "cuda"))
        self.expect("kernels/BUILD.bazel",
                    'cc_library(name = "a", deps = ["@local_cuda//:headers"])', (1, "cuda"))
        self.expect("kernels/cuda/a.cu", "#include <cuda_bf16.h>\n")
        self.expect("nsa/BUILD.bazel",
                    'cc_library(name = "a", srcs = select({"@local_cuda//:is_present": ["a.cc"]}))')

    def test_absl_in_cuda(self):
        self.expect("kernels/cuda/a.cu", '#include "absl/status/status.h"\n', (1, "absl-in-cuda"))
        self.expect("kernels/cuda/a.cuh", "\nabsl::Status F();\n", (2, "absl-in-cuda"))
        self.expect("kernels/cuda/BUILD.bazel",
                    'cuda_library(name = "a", deps = ["@com_google_absl//absl/status"])',
                    (1, "absl-in-cuda"))
        self.expect("kernels/cuda/a.cc", '#include "absl/status/status.h"\n')

    def test_launch(self):
        self.expect("kernels/cuda/a.cuh", "void F() {\n  K<<<1, 1>>>();\n}\n", (2, "launch"))
        self.expect("tests/a.cc", "K<<<1, 1>>>();\n", (1, "launch"))
        self.expect("kernels/cuda/a.cu", "K<<<1, 1>>>();\n")
        self.expect("kernels/a.cc", '// K<<<1, 1>>>\nauto s = "<<<";\nauto r = R"x("<<<)x";\n')

    def test_getenv(self):
        self.expect("comm/bootstrap/a.cc", 'auto n = 1\'000;\nchar* s = std::getenv("A");\n',
                    (2, "getenv"))
        self.expect("examples/a.cc", 'int main() { return std::getenv("A") != nullptr; }\n')
        self.expect("nsa/a.cc", "// not getenv\n")

    def test_example_length(self):
        self.expect("examples/01/a.cc", "\n" * 151, (151, "example-length"))
        self.expect("examples/01/a.cc", "\n" * 150)

    def test_top_level(self):
        self.assertEqual(violations({"src/a.cc": "", "notes.txt": ""}),
                         {("src", 1, "top-level"), ("notes.txt", 1, "top-level")})
        self.assertEqual(violations({"examples/a.cc": "", "README.md": "", ".gitignore": ""}), set())


if __name__ == "__main__":
    unittest.main()
