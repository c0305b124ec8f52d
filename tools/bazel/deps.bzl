"""nsa_dependencies: the repositories that this library builds against.

Labels are those of each project's own Bazel build (@com_google_absl//absl/strings, ...), so a
workspace with a network can declare the real thing under the same name and nothing else changes.
"""

load("//tools/bazel:cuda_repository.bzl", "cuda_repository", "nccl_repository")
load("//tools/bazel:system_repository.bzl", "system_repository")

_HEADER = """\
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])
"""

# Abseil's labels that we use. All of them are one library here: Debian's archives refer to each
# other in circles, hence the group, and the linker takes only the members that are needed.
_ABSL_LABELS = {
    "algorithm": ["algorithm", "container"],
    "base": ["base", "core_headers"],
    "cleanup": ["cleanup"],
    "container": ["btree", "fixed_array", "flat_hash_map", "flat_hash_set", "inlined_vector", "node_hash_map"],
    "debugging": ["failure_signal_handler", "stacktrace", "symbolize"],
    "flags": ["flag", "parse", "usage", "usage_config"],
    "functional": ["any_invocable", "bind_front", "function_ref"],
    "hash": ["hash"],
    "memory": ["memory"],
    "meta": ["type_traits"],
    "numeric": ["bits", "int128"],
    "random": ["bit_gen_ref", "distributions", "random"],
    "status": ["status", "statusor"],
    "strings": ["cord", "str_format", "strings"],
    "synchronization": ["synchronization"],
    "time": ["time"],
    "types": ["optional", "span", "variant"],
    "utility": ["utility"],
}

_ABSL_ARCHIVES = [name for name in """
    bad_any_cast_impl bad_optional_access bad_variant_access base city civil_time cord cord_internal
    cordz_functions cordz_handle cordz_info cordz_sample_token debugging_internal demangle_internal
    examine_stack exponential_biased failure_signal_handler flags_commandlineflag
    flags_commandlineflag_internal flags_config flags_internal flags_marshalling flags_parse
    flags_private_handle_accessor flags_program_name flags_reflection flags_usage
    flags_usage_internal graphcycles_internal hash hashtablez_sampler int128 leak_check log_severity
    low_level_hash malloc_internal periodic_sampler random_distributions random_internal_platform
    random_internal_pool_urbg random_internal_randen random_internal_randen_hwaes
    random_internal_randen_hwaes_impl random_internal_randen_slow random_internal_seed_material
    random_seed_gen_exception random_seed_sequences raw_hash_set raw_logging_internal spinlock_wait
    stacktrace status statusor str_format_internal strerror strings strings_internal symbolize
    synchronization throw_delegate time time_zone
""".replace("\n", " ").split(" ") if name]

# Debian's archives, which are not made for shared libraries, and the option that makes the linker
# take shared libraries in their place: see //tools/bazel:shared_for_archives.
ARCHIVES = ["absl_" + archive for archive in _ABSL_ARCHIVES] + ["protobuf", "z"]
SHARED_FOR_ARCHIVES = "-L$(GENDIR)/%s/tools/bazel/shared_for_archives" % Label("//:WORKSPACE").workspace_root

def _absl_files():
    files = {"BUILD.bazel": _HEADER + """
cc_library(
    name = "absl",
    linkopts = %r,
    deps = ["@nsa//tools/sanitizers:runtime"],
)
""" % (["-Wl,--start-group"] + ["-l:libabsl_%s.a" % a for a in _ABSL_ARCHIVES] + ["-Wl,--end-group", "-lpthread"])}
    for package, names in _ABSL_LABELS.items():
        files["absl/%s/BUILD.bazel" % package] = "package(default_visibility = [\"//visibility:public\"])\n" + "".join([
            "\nalias(name = %r, actual = \"//:absl\")\n" % name
            for name in names
        ])
    return files

# Where current Bazel loads its language rules from; in Bazel 4 they are native.
_RULES_CC = """\
cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_proto_library = native.cc_proto_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
"""

_RULES_PYTHON = """\
py_binary = native.py_binary
py_library = native.py_library
py_test = native.py_test
"""

def _library(name, linkopts = [], extra = ""):
    return "\ncc_library(\n    name = %r,\n    linkopts = %r,\n%s)\n" % (name, linkopts, extra)

def _system_packages():
    """The packages of the operating system, as arguments of system_repository."""
    lib = "/usr/lib/{multiarch}/"
    return {
        "com_google_absl": dict(
            requires = [lib + "libabsl_status.a"],
            files = _absl_files(),
        ),
        "com_google_protobuf": dict(
            requires = [lib + "libprotobuf.a", "/usr/bin/protoc"],
            links = {"bin/protoc": "/usr/bin/protoc"},
            files = {"BUILD.bazel": _HEADER +
                                    _library("protobuf", ["-l:libprotobuf.a", "-l:libz.a", "-lpthread"]) +
                                    "\nfilegroup(name = \"protoc\", srcs = [\"bin/protoc\"])\n"},
        ),
        "com_google_googletest": dict(
            requires = [lib + "libgtest.a", lib + "libgmock.a"],
            files = {"BUILD.bazel": _HEADER +
                                    _library("gtest", ["-l:libgmock.a", "-l:libgtest.a", "-lpthread"]) +
                                    _library("gtest_main", ["-l:libgmock_main.a"], "    deps = [\":gtest\"],\n")},
        ),
        # Debian has benchmark and hwy as shared libraries only: they are also looked for beside
        # the binary, so that a copy can travel with it.
        "com_github_google_benchmark": dict(
            requires = [lib + "libbenchmark.so"],
            files = {"BUILD.bazel": _HEADER +
                                    _library("benchmark", ["-lbenchmark", "-Wl,-rpath,$$ORIGIN", "-lpthread"]) +
                                    _library("benchmark_main", ["-l:libbenchmark_main.a"], "    deps = [\":benchmark\"],\n")},
        ),
        "highway": dict(
            requires = [lib + "libhwy.so"],
            files = {"BUILD.bazel": _HEADER + _library("hwy", ["-lhwy", "-Wl,-rpath,$$ORIGIN"])},
        ),
        # Debian compiles it as a library, with these features, which must be asked for alike.
        "cpp_httplib": dict(
            requires = ["/usr/include/httplib.h", lib + "libcpp-httplib.so"],
            files = {"BUILD.bazel": _HEADER + _library(
                "httplib",
                ["-lcpp-httplib", "-Wl,-rpath,$$ORIGIN", "-lpthread"],
                "    defines = [%s],\n" % ", ".join([
                    "\"CPPHTTPLIB_%s_SUPPORT\"" % name
                    for name in ["OPENSSL", "ZLIB", "BROTLI"]
                ]),
            )},
        ),
        "nlohmann_json": dict(
            requires = ["/usr/include/nlohmann/json.hpp"],
            files = {"BUILD.bazel": _HEADER + _library("json")},
        ),
        # Shared on purpose: which transports UCX and MPI have is the host's matter.
        "openucx": dict(
            requires = [lib + "libucp.so"],
            files = {"BUILD.bazel": _HEADER + _library("ucp", ["-lucp", "-lucs"])},
        ),
        "openmpi": dict(
            requires = [lib + "openmpi/include/mpi.h"],
            links = {"include": lib + "openmpi/include"},
            files = {"BUILD.bazel": _HEADER + _library(
                "mpi",
                ["-lmpi"],
                # MPI's C++ bindings were removed from the standard, and want a library more.
                "    defines = [\"OMPI_SKIP_MPICXX\"],\n" +
                "    hdrs = glob([\"include/**/*.h\"]),\n    includes = [\"include\"],\n",
            )},
        ),
        # Bazel's own: rules that current Bazel downloads. Debian's bazel-rules-cc is too new for
        # Debian's Bazel 4, hence ours; the coverage tools are only named, never run.
        "rules_cc": dict(
            files = {"BUILD.bazel": "", "cc/BUILD.bazel": "", "cc/defs.bzl": _RULES_CC},
        ),
        "rules_python": dict(
            files = {"BUILD.bazel": "", "python/BUILD.bazel": "", "python/defs.bzl": _RULES_PYTHON},
        ),
        "remote_coverage_tools": dict(
            files = {"BUILD.bazel": "filegroup(name = \"coverage_report_generator\", visibility = [\"//visibility:public\"])\n"},
        ),
    }

_BAZEL_RULES = {
    "bazel_skylib": "/usr/share/bazel/tools/skylib",
    "platforms": "/usr/share/bazel/platforms",
    "rules_java": "/usr/share/bazel/rules/java",
    "rules_proto": "/usr/share/bazel/rules/proto",
}

def nsa_dependencies():
    """Declares what is not declared yet."""
    for name, arguments in _system_packages().items():
        if not native.existing_rule(name):
            system_repository(name = name, **arguments)
    for name, path in _BAZEL_RULES.items():
        if not native.existing_rule(name):
            native.local_repository(name = name, path = path)
    if not native.existing_rule("local_cuda"):
        cuda_repository(name = "local_cuda")
    if not native.existing_rule("nccl"):
        nccl_repository(name = "nccl")
    native.register_toolchains("@nsa//tools/bazel:python_toolchain")
