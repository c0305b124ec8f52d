"""cc_proto: a C++ library from .proto files, included as "folder/of/the/file.pb.h"."""

load("@rules_cc//cc:defs.bzl", "cc_library")

def cc_proto(name, srcs, deps = [], **kwargs):
    """Runs protoc on `srcs` and compiles what it writes.

    Args:
      name: of the cc_library.
      srcs: .proto files of this package. They import others by their path from the repository root.
      deps: cc_proto targets whose files these import.
      **kwargs: visibility, testonly.
    """
    protos = name + "_protos"
    native.filegroup(
        name = protos,
        srcs = srcs + [d + "_protos" if ":" in d else d + ":" + d.split("/")[-1] + "_protos" for d in deps],
        **kwargs
    )
    repository = native.repository_name().strip("@")
    root = "external/" + repository if repository else "."
    outs = [src[:-len("proto")] + ext for src in srcs for ext in ["pb.h", "pb.cc"]]
    native.genrule(
        name = name + "_protoc",
        srcs = srcs + [protos],
        outs = outs,
        cmd = "$(execpath @com_google_protobuf//:protoc) --proto_path={root} --cpp_out=$(GENDIR)/{root} {srcs}".format(
            root = root,
            srcs = " ".join(["$(execpath %s)" % src for src in srcs]),
        ),
        tools = ["@com_google_protobuf//:protoc"],
        **kwargs
    )
    cc_library(
        name = name,
        srcs = [o for o in outs if o.endswith(".cc")],
        hdrs = [o for o in outs if o.endswith(".h")],
        deps = deps + ["@com_google_protobuf//:protobuf"],
        **kwargs
    )
