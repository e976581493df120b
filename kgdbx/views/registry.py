"""Every view by name: functions of a session, and of arguments that JSON has."""

from collections.abc import Callable
from typing import Any

from kgdbx.views.modules import modules
from kgdbx.views.names import members, module_functions, module_names, parameters, signatures
from kgdbx.views.slabs import slabs
from kgdbx.views.tasks import tasks

__all__ = ("VIEWS",)

VIEWS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        members,
        module_functions,
        module_names,
        modules,
        parameters,
        signatures,
        slabs,
        tasks,
    )
}
"""Those that need nothing but the session."""
