"""maps: what aggregations have summed up."""

import argparse

from kgdbx.commands.context import Context
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.trace.map_text import map_text


@SESSION_COMMANDS.command(
    name="maps",
    summary="Show what aggregations such as '@[$comm] = hist(count)' have summed up.",
    description="A probe has one in place of fields: kgdbx kprobe vfs_read @[$comm] = hist(count)",
    needs_session=True,
)
def maps(context: Context, args: argparse.Namespace) -> None:
    texts = [map_text(each) for each in context.session.resident.maps.read()]
    context.write("\n".join(filter(None, texts)) or "Nothing was summed up.")
