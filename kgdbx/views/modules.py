"""The loaded modules, as ``lsmod`` shows them."""

from typing import Any

import drgn

from kgdbx.session import Session

__all__ = ("modules",)


def modules(session: Session) -> dict[str, Any]:
    """All loaded modules by name.

    :return: ``rows`` of name, base address, size in bytes, references, and whether there is a
        debug file; ``errors`` says what could not be read
    """
    program = session.kernel.program
    known = session.kernel.modules
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    try:
        for each in known:
            module = drgn.Object(program, "struct module *", value=each.struct_address)
            rows.append(
                {
                    "module": each.name,
                    "base": each.base,
                    "bytes": sum(size for _, size, init in each.regions if not init),
                    # MODULE_REF_BASE of kernel/module/main.c is one.
                    "refs": max(0, module.refcnt.counter.value_() - 1),
                    "debug": "yes" if known.debug_file(each.name) else "no",
                }
            )
    except drgn.FaultError as e:  # one goes while the kernel runs
        errors.append(f"the list ends early: {e}")
    return {"rows": sorted(rows, key=lambda row: str(row["module"])), "errors": errors}
