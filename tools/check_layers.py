#!/usr/bin/env python3
"""Checks the rules that hold the folders apart, in includes, in code and in Bazel dependencies.

Usage: tools/check_layers.py [ROOT]. Prints each violation as "file:line: [rule] message" and exits 1
if there is one. What a rule is for stands beside it below.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

FOLDERS = ("benchmarks", "comm", "examples", "kernels", "nsa", "tests", "tools")
TOP_LEVEL_FILES = {"BUILD.bazel", "WORKSPACE", "README.md", "DESIGN.md", "CONTRIBUTING.md",
                   "CHANGELOG.md", "LICENSE"}
SOURCE_SUFFIXES = (".c", ".cc", ".cu", ".cuh", ".h")

# layers: comm knows nothing of attention, kernels nothing of ranks, and neither knows nsa.
LAYERS = {"comm": {"comm"}, "kernels": {"kernels"}, "nsa": {"comm", "kernels", "nsa"}}
# backends: nsa is handed a Communicator and a Kernels object; only its tests name one, and the C
# interface, whose callers cannot make them: what a program's main() does for C++, it does for them.
COMPOSITION_ROOT = "nsa/c_api"
BACKENDS = ("comm/loopback", "comm/nccl", "comm/ucx", "kernels/cpu", "kernels/cuda")
# transport: each transport is known in one folder, so that it can be left out or exchanged.
# (pattern of the header, Bazel repository, the folder)
TRANSPORTS = (
    (re.compile(r"nccl(_device)?\.h$|nccl_device/"), "@nccl", "comm/nccl"),
    (re.compile(r"uc[pstm]/"), "@openucx", "comm/ucx"),
    (re.compile(r"mpi\.h$|mpi/|openmpi/"), "@openmpi", "comm/bootstrap"),
)
# cuda: nsa and the CPU kernels build and run where there is no CUDA.
CUDA_HEADER = re.compile(r"cu(da|blas|rand|b/)|cooperative_groups|device_launch_parameters")
MAX_EXAMPLE_LINES = 150

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)
# A raw string, a comment, a string or a character; the last not after a digit (1'000).
NOT_CODE = re.compile(
    r'R"(?P<d>[^()\\\s]*)\(.*?\)(?P=d)"'
    r'|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9A-Fa-f])\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def blank(match):
    """Spaces in place of a match, keeping its lines."""
    return re.sub(r"[^\n]", " ", match.group())


def blank_comment(match):
    return blank(match) if match.group().startswith("/") else match.group()


def is_under(path, folder):
    return path == folder or path.startswith(folder + "/")


def check_dependency(path, is_test, target):
    """(rule, message) for each rule that a use of `target`, a path of ours, breaks at `path`."""
    folder, used = path.split("/")[0], target.split("/")[0]
    if folder not in LAYERS or used not in FOLDERS:
        return
    if used not in LAYERS[folder] and used != "tools" and not (is_test and used == "tests"):
        yield "layers", f"{folder}/ may not use {target}"
    elif folder == "nsa" and not is_test and not is_under(path, COMPOSITION_ROOT):
        for backend in BACKENDS:
            if is_under(target, backend):
                yield "backends", f"nsa/ names no backend, but uses {target}"


def may_use_cuda(path):
    return not is_under(path, "nsa") and (
        not is_under(path, "kernels") or is_under(path, "kernels/cuda"))


def check_include(path, is_test, header):
    yield from check_dependency(path, is_test, header)
    for pattern, _, folder in TRANSPORTS:
        if pattern.match(header) and not is_under(path, folder):
            yield "transport", f"{header} is included only in {folder}/"
    if CUDA_HEADER.match(header) and not may_use_cuda(path):
        yield "cuda", f"{header} may not be included here"
    # absl-in-cuda: nvcc compiles C++17 and slowly; .cu files return cudaError_t.
    if header.startswith("absl/") and path.endswith((".cu", ".cuh")):
        yield "absl-in-cuda", f"{header} in a CUDA source"


def check_source(path, text):
    """(line, rule, message) for each violation in a C, C++ or CUDA file."""
    is_test = bool(re.search(r"_test(lib|ing)?\.[a-z]+$", path))
    uncommented = NOT_CODE.sub(blank_comment, text)
    code = NOT_CODE.sub(blank, text)

    def line_of(offset):
        return text.count("\n", 0, offset) + 1

    for match in INCLUDE.finditer(uncommented):
        for rule, message in check_include(path, is_test, match.group(1)):
            yield line_of(match.start(1)), rule, message

    # launch: a kernel is launched where it is defined, behind a function that C++ can call.
    if not path.endswith(".cu"):
        for match in re.finditer(r"<<<", code):
            yield line_of(match.start()), "launch", "<<<>>> outside a .cu file"
    if path.endswith((".cu", ".cuh")):
        for match in re.finditer(r"\babsl::", code):
            yield line_of(match.start()), "absl-in-cuda", "absl:: in a CUDA source"
    # getenv: settings are arguments; only a program reads its environment, and the C interface where
    # its caller asks for it.
    if not re.search(r"\bint\s+main\s*\(", code) and not is_under(path, COMPOSITION_ROOT):
        for match in re.finditer(r"\b(secure_)?getenv\b", code):
            yield line_of(match.start()), "getenv", "getenv outside a file that defines main()"
    # example-length: an example is read in one go.
    num_lines = len(text.splitlines())
    if is_under(path, "examples") and path.endswith(".cc") and num_lines > MAX_EXAMPLE_LINES:
        yield num_lines, "example-length", f"{num_lines} lines, at most {MAX_EXAMPLE_LINES}"


def check_label(path, kind, is_test, label):
    package = os.path.dirname(path)
    ours = re.match(r"(?:@nsa)?//([^:]*)", label)
    if ours:
        yield from check_dependency(path, is_test, ours.group(1))
    repository = label.split("//")[0]
    for _, transport, folder in TRANSPORTS:
        if repository == transport and not is_under(package, folder):
            yield "transport", f"{label} is used only in {folder}/"
    if repository == "@local_cuda" and not may_use_cuda(path):
        yield "cuda", f"{label} may not be used here"
    if repository == "@com_google_absl" and kind == "cuda_library":
        yield "absl-in-cuda", f"{label} in a cuda_library"


def check_build_file(path, text):
    """The same for a BUILD file, whose syntax is Python's."""
    for statement in ast.parse(text).body:
        for call in (n for n in ast.walk(statement) if isinstance(n, ast.Call)):
            kind = getattr(call.func, "id", "")
            attributes = {k.arg: k.value for k in call.keywords}
            if kind in ("load", "package", "select", "glob"):
                continue
            testonly = isinstance(attributes.get("testonly"), ast.Constant) and bool(
                attributes["testonly"].value)
            # The keys of a select() are conditions, not dependencies.
            conditions = {id(key) for d in ast.walk(call) if isinstance(d, ast.Dict) for key in d.keys}
            for name in attributes.keys() - {"visibility", "tags", "name"}:
                for node in ast.walk(attributes[name]):
                    if id(node) in conditions or not isinstance(node, ast.Constant):
                        continue
                    is_test = testonly or kind.endswith("_test")
                    for rule, message in check_label(path, kind, is_test, str(node.value)):
                        yield node.lineno, rule, message


def check_top_level(root):
    """The top level is the folders and files above and nothing else; dot files are tools' own."""
    git = subprocess.run(["git", "-C", root, "ls-files"], capture_output=True, text=True, check=False)
    paths = git.stdout.splitlines() if git.returncode == 0 else os.listdir(root)
    for name in sorted({path.split("/")[0] for path in paths}):
        if name not in FOLDERS and name not in TOP_LEVEL_FILES and not name.startswith("."):
            yield f"{name}:1: [top-level] not one of the folders and files that stand here"


def check_tree(root):
    """Every violation under `root`, and the number of files read."""
    violations = list(check_top_level(root))
    num_files = 0
    for path in sorted(p for folder in FOLDERS for p in Path(root, folder).rglob("*")):
        relative = path.relative_to(root).as_posix()
        if "/bazel-" in relative or not path.is_file():
            continue
        if path.suffix in SOURCE_SUFFIXES:
            check = check_source
        elif path.name in ("BUILD", "BUILD.bazel"):
            check = check_build_file
        else:
            continue
        num_files += 1
        text = path.read_text(encoding="utf-8")
        violations += [f"{relative}:{line}: [{rule}] {message}"
                       for line, rule, message in check(relative, text)]
    return violations, num_files


def main():
    root = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    violations, num_files = check_tree(root)
    print("\n".join(violations + [f"check_layers: {num_files} files, {len(violations)} violations"]))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
