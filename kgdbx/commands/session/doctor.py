"""doctor: what the attached kernel and its transport can do."""

import argparse

from kgdbx.commands.context import Context
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.doctor import host_checks, session_checks
from kgdbx.render import checks_table


@SESSION_COMMANDS.command(
    name="doctor",
    summary="Check the host, and the attached kernel.",
)
def doctor(context: Context, args: argparse.Namespace) -> None:
    checks = list(host_checks())
    if context.attached:
        checks += session_checks(context.session)
    context.write(checks_table(checks, context.style))
