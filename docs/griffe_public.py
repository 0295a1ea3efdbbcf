"""What griffe, which reads the sources for the site, cannot see in them."""

import inspect
import pydoc
import re

import griffe

REWRITES = (
    # Links, where a name is one of ours.
    (re.compile(r"(?<!\[)`(?:warpformer\.((?:\w+\.)*\w+)|(ops\.\w+))`"), r"[\g<0>][warpformer.\1\2]"),
    # An empty name, or what is before the first colon would be taken for one.
    (re.compile(r"^Returns:\n +(?=[^ :])", re.M), r"\g<0>: "),
    # A section like that of the constructor's.
    (re.compile(r"^Args of forward:", re.M), "Args: Parameters of forward:"),
)
# A field of a NamedTuple, and the comment that explains it.
FIELD = re.compile(r"^    (\w+): [^#\n]+  # (.+)$", re.M)


class PublicNames(griffe.Extension):
    """Every object under its name in `__all__`, with its inherited constructor; names in prose are links."""

    def on_package(self, *, pkg, **kwargs):
        packages = [module for module in (*pkg.modules.values(), pkg) if module.exports]
        found = [
            (package, name, definition(package, name)) for package in packages for name in package.exports
        ]
        for package, name, member in found:
            if member.is_class or member.is_function:
                package.members[name], member.parent = member, package
        for _, _, member in found:
            if member.is_class:
                inherit_constructor(member)

    def on_class_members(self, *, cls, **kwargs):
        fields = FIELD.findall(cls.source) if "NamedTuple" in map(str, cls.bases) else ()
        if fields and cls.docstring:
            lines = [f"    {name}: {comment}" for name, comment in fields]
            cls.docstring.value = "\n".join([cls.docstring.value, "", "Attributes:", *lines])

    def on_object(self, *, obj, **kwargs):  # twice for some
        for pattern, replacement in REWRITES if obj.docstring else ():
            obj.docstring.value = pattern.sub(replacement, obj.docstring.value)


def definition(package, name):
    """`warpformer.ops.linear` is a function; for griffe, the file of that name."""
    member = package.members[name]
    while member.is_alias or (member.is_module and name in member.members):
        member = member.target if member.is_alias else member.members[name]
    return member


def inherit_constructor(cls):
    """That of torch's class, or of a NamedTuple, neither of which griffe reads."""
    own = pydoc.locate(cls.path)
    init = cls.members.get("__init__")
    if issubclass(own, Exception) or (init and "args" not in init.parameters):
        return
    parameters = inspect.signature(own).parameters.values()
    init = griffe.Function("__init__", parent=cls)
    init.parameters = griffe.Parameters(*map(parameter, parameters))
    cls.set_member("__init__", init)


def parameter(own):
    default = None if own.default is own.empty else getattr(own.default, "__name__", repr(own.default))
    return griffe.Parameter(own.name, kind=griffe.ParameterKind[own.kind.name.lower()], default=default)
