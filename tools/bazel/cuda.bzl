"""cuda_library: .cu files compiled by nvcc, as a library that C++ targets depend on."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")
load("@local_cuda//:toolkit.bzl", "NVCC", "NVCC_VERSION")

# For target_compatible_with: without a toolkit the target is skipped, and so is what depends on it.
REQUIRES_CUDA = select({
    "@local_cuda//:is_present": [],
    "//conditions:default": ["@nsa//tools/bazel:cuda_toolkit"],
})

# For cuda_library's archs: what nvcc's -gencode takes.
#
# Hopper's own instructions exist for sm_90a alone. What does without them is translated once, to
# the PTX of compute_80 or, with bulk copies, compute_90, and from there to machine code for Hopper,
# so that nothing is left to the driver where speed is measured; on any other GPU from sm_80 or
# sm_90 on, the driver translates that PTX.
HOPPER = ["arch=compute_90a,code=sm_90a"]
HOPPER_AND_LATER = ["arch=compute_90,code=[sm_90,compute_90]"]
PORTABLE = ["arch=compute_80,code=[sm_90,compute_80]"]

_NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",  # constexpr functions of plain headers on the device
    "-lineinfo",  # for ncu and compute-sanitizer; costs no speed
    "-Werror=all-warnings",
    # NCCL's device headers have unused parameters, and nvcc does not take them for system headers.
    "-Xcompiler=-fPIC,-Wall,-Wextra,-Wno-unused-parameter,-ffp-contract=off",
]

def _cuda_library_impl(ctx):
    cc_toolchain = find_cpp_toolchain(ctx)
    features = cc_common.configure_features(ctx = ctx, cc_toolchain = cc_toolchain)

    # Includes are from the root of this repository, which is not the current folder when another
    # workspace uses it.
    root = ctx.label.workspace_root
    roots = [root or ".", ctx.bin_dir.path + "/" + root, ctx.genfiles_dir.path + "/" + root]
    own = cc_common.create_compilation_context(
        headers = depset(ctx.files.hdrs),
        quote_includes = depset(roots),
    )
    deps = cc_common.merge_cc_infos(
        direct_cc_infos = [CcInfo(compilation_context = own)],
        cc_infos = [dep[CcInfo] for dep in ctx.attr.deps],
    )
    seen = deps.compilation_context

    objects = []
    for src in [f for f in ctx.files.srcs if f.extension == "cu"]:
        obj = ctx.actions.declare_file("_objs/%s/%s.pic.o" % (ctx.label.name, src.basename))
        args = ctx.actions.args()
        args.add_all(_NVCC_FLAGS)
        args.add_all(ctx.attr.archs, format_each = "-gencode=%s")
        args.add(cc_toolchain.compiler_executable, format = "-ccbin=%s")
        args.add_all(seen.defines, format_each = "-D%s")
        args.add_all(seen.quote_includes, format_each = "-I%s", uniquify = True)
        args.add_all(seen.includes, before_each = "-isystem")
        args.add_all(seen.system_includes, before_each = "-isystem")
        args.add_all(ctx.attr.copts)
        args.add_all(["-c", src, "-o", obj])
        ctx.actions.run(
            executable = NVCC,
            arguments = [args],
            inputs = depset(ctx.files.srcs, transitive = [seen.headers]),
            outputs = [obj],
            # NVCC_VERSION is here for the action's key: a new toolkit does not hit an old cache.
            # nvcc names temporary files by its process number, which is small and the same in every
            # sandbox: they go to the action's own folder, where those of another build are not.
            env = {"PATH": "/usr/bin:/bin", "NVCC_VERSION": NVCC_VERSION, "TMPDIR": "."},
            mnemonic = "CudaCompile",
            progress_message = "Compiling %s" % src.short_path,
        )
        objects.append(obj)

    linking_context, _ = cc_common.create_linking_context_from_compilation_outputs(
        actions = ctx.actions,
        name = ctx.label.name,
        feature_configuration = features,
        cc_toolchain = cc_toolchain,
        compilation_outputs = cc_common.create_compilation_outputs(
            objects = depset(objects),
            pic_objects = depset(objects),
        ),
        linking_contexts = [deps.linking_context],
        disallow_dynamic_library = True,
    )
    return [
        DefaultInfo(files = depset(objects)),
        CcInfo(compilation_context = seen, linking_context = linking_context),
    ]

_cuda_library = rule(
    implementation = _cuda_library_impl,
    attrs = {
        "srcs": attr.label_list(allow_files = [".cu", ".cuh", ".h"]),
        "hdrs": attr.label_list(allow_files = [".cuh", ".h"]),
        "deps": attr.label_list(providers = [CcInfo]),
        "archs": attr.string_list(mandatory = True),
        "copts": attr.string_list(),
        "_cc_toolchain": attr.label(default = "@bazel_tools//tools/cpp:current_cc_toolchain"),
    },
    fragments = ["cpp"],
    toolchains = ["@bazel_tools//tools/cpp:toolchain_type"],
)

def cuda_library(name, srcs, hdrs = [], deps = [], archs = HOPPER, copts = [], **kwargs):
    """Compiles `srcs` for the GPU.

    Args:
      name: of the target; depend on it from cc_library, cc_test or another cuda_library.
      srcs: .cu files, and headers that only they include.
      hdrs: headers for those who depend on this.
      deps: C++ and CUDA libraries. The CUDA runtime, linked statically, is always one.
      archs: HOPPER, HOPPER_AND_LATER or PORTABLE.
      copts: further flags for nvcc, e.g. ["-Xptxas=-v", "--maxrregcount=128"].
      **kwargs: visibility, tags, testonly.
    """
    _cuda_library(
        name = name,
        srcs = srcs,
        hdrs = hdrs,
        deps = deps + ["@local_cuda//:cudart"],
        archs = archs,
        copts = copts,
        target_compatible_with = REQUIRES_CUDA,
        **kwargs
    )
