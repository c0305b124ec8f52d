"""lazy_library: stands in for a shared library at link time and opens the real one when asked to."""

load("@rules_cc//cc:defs.bzl", "cc_library")

# Each function is a jump through a table, which OpenLibrary fills.
_SOURCE = """\
// Made by lazy_library of tools/bazel/lazy_library.bzl.
#include "{header}"

#include "comm/lazy_library.h"

#ifndef __x86_64__
#error "lazy_library knows the jump of x86-64 alone"
#endif

namespace {{

constexpr const char* kSymbols[] = {{
{names}
}};

}}  // namespace

extern "C" {{
__attribute__((visibility("hidden"), used)) void (*{table}[])() = {{
{initial}
}};
}}

__asm__(
    ".text\\n"
{jumps});

namespace nsa::comm {{

absl::Status {function}() {{
  return OpenLibrary({{"{title}", "{soname}", kSymbols, {table}}});
}}

}}  // namespace nsa::comm
"""

_JUMP = """\
    ".globl {symbol}\\n"
    ".type {symbol}, @function\\n"
    "{symbol}: jmp *{table}+{offset}(%rip)\\n"
    ".size {symbol}, .-{symbol}\\n"
"""

def _lazy_source_impl(ctx):
    table = "nsa_" + ctx.attr.library + "_functions"
    symbols = ctx.attr.symbols
    ctx.actions.write(ctx.outputs.out, _SOURCE.format(
        header = ctx.attr.header,
        names = "\n".join(["    \"%s\"," % symbol for symbol in symbols]),
        initial = "    &nsa::comm::CalledBeforeOpen,\n" * len(symbols),
        table = table,
        jumps = "".join([
            _JUMP.format(symbol = symbols[i], table = table, offset = 8 * i)
            for i in range(len(symbols))
        ]),
        function = ctx.attr.function,
        title = ctx.attr.title,
        soname = ctx.attr.soname,
    ))

_lazy_source = rule(
    implementation = _lazy_source_impl,
    attrs = {
        "out": attr.output(mandatory = True),
        "header": attr.string(mandatory = True),
        "library": attr.string(mandatory = True),
        "title": attr.string(mandatory = True),
        "soname": attr.string(mandatory = True),
        "symbols": attr.string_list(mandatory = True),
        "function": attr.string(mandatory = True),
    },
)

def lazy_library(name, hdr, function, title, soname, symbols, **kwargs):
    """A library that defines `symbols` as jumps to those of the shared library `soname`.

    Linked before the real library with -Wl,--as-needed, it leaves no need of that at start.

    Args:
      name: of the target, and of the source that is made.
      hdr: declares `absl::Status function();` of nsa::comm, which opens the library.
      function: its name.
      title: the library's name in errors.
      soname: the library's name for the loader.
      symbols: the functions of it that are called.
      **kwargs: visibility, testonly.
    """
    _lazy_source(
        name = name + "_source",
        out = name + ".cc",
        header = native.package_name() + "/" + hdr,
        library = name,
        title = title,
        soname = soname,
        symbols = symbols,
        function = function,
        testonly = kwargs.get("testonly", False),
    )
    cc_library(
        name = name,
        srcs = [name + ".cc"],
        hdrs = [hdr],
        linkopts = ["-ldl"],
        deps = [
            "@nsa//comm:lazy_library",
            "@com_google_absl//absl/status",
        ],
        alwayslink = True,
        **kwargs
    )
