"""A repository made of packages that the operating system has installed."""

def _system_repository_impl(ctx):
    # Debian keeps libraries and some headers in a folder named after the architecture.
    multiarch = ctx.execute(["gcc", "-print-multiarch"]).stdout.strip()
    for path in ctx.attr.requires:
        place = path.replace("{multiarch}", multiarch)
        if not ctx.path(place).exists:
            fail("@%s needs %s: run tools/setup.sh, or declare @%s yourself before nsa_dependencies()" %
                 (ctx.name, place, ctx.name))
    for link, target in ctx.attr.links.items():
        ctx.symlink(target.replace("{multiarch}", multiarch), link)
    for path, content in ctx.attr.files.items():
        ctx.file(path, content, executable = False)
    ctx.file("WORKSPACE", "workspace(name = \"%s\")\n" % ctx.name, executable = False)

system_repository = repository_rule(
    implementation = _system_repository_impl,
    local = True,
    attrs = {
        "requires": attr.string_list(doc = "Paths without which the repository makes no sense."),
        "links": attr.string_dict(doc = "Path in the repository: place in the file system."),
        "files": attr.string_dict(doc = "Path in the repository: content."),
    },
)
