"""Names that a user may type next: parameters, members of structures, functions of modules."""

import drgn

from kgdbx.errors import KgdbxError
from kgdbx.probes.resolve import parse_place, resolve_points
from kgdbx.session import Session
from kgdbx.symbols.kernel import Function

__all__ = (
    "members",
    "members_of_type",
    "module_functions",
    "module_names",
    "parameters",
    "signatures",
)


def parameters(session: Session, place: str) -> list[list[str]]:
    """Name and C type of each parameter of the function at a place."""
    function = _function(session, place)
    type_ = session.kernel.function_type(function) if function is not None else None
    if type_ is None:
        return [[name, ""] for name in session.parameter_names(place)]
    return [[p.name, p.type.type_name()] for p in type_.parameters if p.name]


def members(session: Session, place: str, path: str) -> list[list[str]]:
    """Name and C type of each member of what a path of a probe's field leads to.

    :param place: the probed place
    :param path: ``file->f_inode``: the first name is a parameter's
    :return: empty if it leads nowhere
    """
    names = path.replace("->", ".").split(".")
    function = _function(session, place)
    type_ = session.kernel.function_type(function) if function is not None else None
    if type_ is None:
        return []
    found = next((p.type for p in type_.parameters if p.name == names[0]), None)
    for name in names[1:]:
        found = _member(found, name.partition("[")[0]) if found is not None else None
    return members_of_type(found) if found is not None else []


def members_of_type(type_: drgn.Type) -> list[list[str]]:
    """Name and C type of each member of a structure, or of what a pointer points to; else none."""
    bare = _bare(type_)
    return _all_members(bare) if bare is not None else []


def signatures(session: Session, functions: list[str]) -> dict[str, str]:
    """C declaration of each function that has debug information."""
    found = {}
    for name in functions:
        function = _function(session, name)
        type_ = session.kernel.function_type(function) if function is not None else None
        if type_ is not None:
            found[name] = _declaration(name, type_)
    return found


def module_functions(session: Session, module: str) -> list[str]:
    """Names of the functions of a loaded module."""
    # The padding before a function may have a symbol, see CONFIG_CALL_PADDING.
    return [name for name in session.function_names(module) if not name.startswith("__pfx_")]


def module_names(session: Session) -> list[str]:
    """Names of the modules that are loaded, or have debug files."""
    return list(session.kernel.modules.known_names())


def _function(session: Session, place: str) -> Function | None:
    # Half a name need not mean anything.
    try:
        parsed = parse_place(place)
        points, _ = resolve_points(session.kernel, parsed, module=None, inlined=False)
    except KgdbxError:
        return None
    return points[0].function if points else None


def _bare(type_: drgn.Type) -> drgn.Type | None:
    # The structure behind typedefs, one pointer, and arrays.
    pointers = 0
    while True:
        if type_.kind is drgn.TypeKind.TYPEDEF or type_.kind is drgn.TypeKind.ARRAY:
            type_ = type_.type
        elif type_.kind is drgn.TypeKind.POINTER and not pointers:
            type_, pointers = type_.type, 1
        elif type_.kind in (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION):
            return type_
        else:
            return None


def _member(type_: drgn.Type, name: str) -> drgn.Type | None:
    bare = _bare(type_)
    if bare is None or not bare.has_member(name):
        return None
    return bare.member(name).type


def _all_members(type_: drgn.Type) -> list[list[str]]:
    found: list[list[str]] = []
    for member in type_.members or ():
        if member.name:
            found.append([member.name, member.type.type_name()])
        else:  # anonymous: its members are ours
            inner = _bare(member.type)
            found += _all_members(inner) if inner is not None else []
    return found


def _declaration(name: str, type_: drgn.Type) -> str:
    shown = [_declared(p.type.type_name(), p.name or "") for p in type_.parameters]
    if type_.is_variadic:
        shown.append("...")
    return f"{_declared(type_.type.type_name(), name)}({', '.join(shown) or 'void'})"


def _declared(type_name: str, name: str) -> str:
    return f"{type_name}{name}" if type_name.endswith("*") else f"{type_name} {name}".strip()
