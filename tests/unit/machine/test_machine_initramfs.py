"""The cpio archive, read back by a parser written from the format's description."""

import stat

from kgdbx.machine.initramfs import pack_cpio


def _unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    entries, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        at = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(archive)
            return entries
        entries[name] = (mode, archive[at : at + size])
        at = (at + size + 3) & ~3


def test_content_links_and_parents() -> None:
    entries = _unpack(pack_cpio({"a/b/c": b"12345", "a/link": "b/c"}, {"a/b/c": 0o640}))
    assert entries["a/b/c"] == (stat.S_IFREG | 0o640, b"12345")
    assert entries["a/link"] == (stat.S_IFLNK | 0o777, b"b/c")
    assert entries["a/b"] == (stat.S_IFDIR | 0o755, b"")
    assert stat.S_ISCHR(entries["dev/console"][0])


def test_parents_come_first() -> None:
    names = list(_unpack(pack_cpio({"z/y/x": b"", "a": b""})))
    assert names.index("z") < names.index("z/y") < names.index("z/y/x")


def test_same_content_same_archive() -> None:
    assert pack_cpio({"a": b"1", "b": b"2"}) == pack_cpio({"b": b"2", "a": b"1"})
