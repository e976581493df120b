"""Sizes of buffers as they are typed."""

import argparse

import pytest

from kgdbx.commands.buffer import buffer_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4K", 4096), ("5k", 8192), ("16M", 16 << 20), ("3m", 4 << 20), ("1G", 1 << 30)],
)
def test_next_power_of_two(text: str, size_bytes: int) -> None:
    assert buffer_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "16", "M", "1.5M", "-1M", "3K", "2G", "16MB", "١K"])
def test_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size from 4K to 1G, such as 16M"):
        buffer_bytes(text)
