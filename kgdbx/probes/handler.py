"""Handlers: called with what they name."""

import errno
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from kgdbx.errors import ProbeError
from kgdbx.probes.probe import Hit

__all__ = ("Supplier", "bind_handler")

Supplier = Callable[[Hit], Any]


def bind_handler(
    handler: Callable[..., Any], suppliers: Mapping[str, Supplier], what: str
) -> Callable[[Hit], Any]:
    """Make a function of a hit that calls *handler* with the values that its parameters name.

    :param suppliers: what may be named
    :param what: the handler's place, for messages
    :raises ProbeError: EINVAL if a parameter names nothing that is there
    """
    name = getattr(handler, "__name__", repr(handler))
    chosen: list[Supplier] = []
    keywords: list[tuple[str, Supplier]] = []
    for parameter in inspect.signature(handler).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise ProbeError(f"{name}() takes *{parameter.name}; name the values it needs instead")
        if parameter.kind is parameter.VAR_KEYWORD:
            taken = {key for key, _ in keywords} | set(inspect.signature(handler).parameters)
            keywords += [(key, s) for key, s in suppliers.items() if key not in taken]
        elif parameter.name in suppliers:
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords.append((parameter.name, suppliers[parameter.name]))
            else:
                chosen.append(suppliers[parameter.name])
        elif parameter.default is parameter.empty:
            raise ProbeError(
                f"{name}() has a parameter {parameter.name!r}, which {what} does not; "
                f"there are: {', '.join(suppliers)}",
                errno.EINVAL,
            )
    positional = tuple(chosen)
    if not keywords:
        return lambda hit: handler(*[supply(hit) for supply in positional])
    named = tuple(keywords)
    return lambda hit: handler(
        *[supply(hit) for supply in positional], **{key: supply(hit) for key, supply in named}
    )
