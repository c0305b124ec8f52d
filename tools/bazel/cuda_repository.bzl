"""@local_cuda and @nccl: the CUDA toolkit of this machine, and NCCL.

The toolkit is the one at $CUDA_HOME or $CUDA_PATH, else the one at /usr/local/cuda. Without a toolkit
both repositories still exist, and what needs them is skipped. `--@local_cuda//:present=false` skips
the CUDA targets on a machine with a toolkit, too.
"""

_BUILD = """\
load("@bazel_skylib//rules:common_settings.bzl", "bool_flag")
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

bool_flag(name = "present", build_setting_default = {present})

config_setting(name = "is_present", flag_values = {{":present": "True"}})

# What host code sees. nvcc finds its own headers, so CCCL's thousands of files stay out.
cc_library(
    name = "headers",
    hdrs = glob(
        ["include/*.h", "include/*.hpp", "include/crt/**", "include/nvtx3/**"],
        exclude = ["include/nccl*"],
        allow_empty = True,
    ),
    includes = ["include"],
)

cc_library(
    name = "cudart",
    linkopts = {cudart_linkopts},
    deps = [":headers"],
)
"""

_NCCL_BUILD = """\
load("@bazel_skylib//rules:common_settings.bzl", "bool_flag")
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

bool_flag(name = "found", build_setting_default = {found})

# For select(): can GPU programs of several ranks be built, with a toolkit and NCCL?
config_setting(
    name = "is_present",
    flag_values = {{
        ":found": "True",
        "@local_cuda//:present": "True",
    }},
)

# nccl.h, and the device API for .cu files.
cc_library(
    name = "headers",
    hdrs = glob(["include/nccl*.h", "include/nccl_device/**"], allow_empty = True),
    includes = ["include"],
    target_compatible_with = {compatible},
    deps = ["@local_cuda//:headers"],
)

# Shared: the NCCL that runs is the host's, found by the loader.
cc_library(
    name = "nccl",
    linkopts = {linkopts},
    target_compatible_with = {compatible},
    deps = [":headers"],
)
"""

def _find_toolkit(ctx):
    """The toolkit's folder, or None."""
    named = ctx.os.environ.get("CUDA_HOME") or ctx.os.environ.get("CUDA_PATH")
    place = named or "/usr/local/cuda"
    return place if ctx.path(place + "/bin/nvcc").exists else None

def _cuda_repository_impl(ctx):
    toolkit = _find_toolkit(ctx)
    version = ""
    cudart_linkopts = []
    if toolkit:
        version = ctx.execute([toolkit + "/bin/nvcc", "--version"]).stdout.strip().split("\n")[-1]
        cudart_linkopts = ["-L%s/lib64" % toolkit, "-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
        ctx.symlink(toolkit + "/include", "include")
    ctx.file("toolkit.bzl", "NVCC = %r\nNVCC_VERSION = %r\n" % (
        toolkit + "/bin/nvcc" if toolkit else "",
        version,
    ))
    ctx.file("BUILD.bazel", _BUILD.format(present = bool(toolkit), cudart_linkopts = cudart_linkopts))

cuda_repository = repository_rule(
    implementation = _cuda_repository_impl,
    configure = True,
    local = True,
    environ = ["CUDA_HOME", "CUDA_PATH"],
)

def _nccl_repository_impl(ctx):
    compatible = ["@nsa//tools/bazel:nccl"]  # no platform has it: whoever needs NCCL is skipped
    linkopts = []
    toolkit = _find_toolkit(ctx)
    for place in [ctx.os.environ.get("NCCL_HOME"), toolkit, "/usr"] if toolkit else []:
        if place and ctx.path(place + "/include/nccl.h").exists:
            compatible = []
            ctx.symlink(place + "/include", "include")
            linkopts = ["-L%s/lib64" % place, "-L%s/lib" % place, "-lnccl"]
            break
    ctx.file("BUILD.bazel", _NCCL_BUILD.format(
        found = bool(linkopts),
        compatible = compatible,
        linkopts = linkopts,
    ))

nccl_repository = repository_rule(
    implementation = _nccl_repository_impl,
    configure = True,
    local = True,
    environ = ["CUDA_HOME", "CUDA_PATH", "NCCL_HOME"],
)
