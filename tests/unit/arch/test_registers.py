import pytest

from kgdbx.arch.registers import ARGUMENT_REGISTERS, DEFAULT_LAYOUT, RegisterLayout, Registers
from kgdbx.errors import ProtocolError

CORE = """<?xml version="1.0"?>
<!DOCTYPE feature SYSTEM "gdb-target.dtd">
<feature name="org.gnu.gdb.i386.core">
  <flags id="x64_eflags" size="4"><field name="CF" start="0" end="0"/></flags>
  <reg name="rax" bitsize="64" type="int64" regnum="0"/>
  <reg name="rip" bitsize="64" type="code_ptr"/>
  <reg name="eflags" bitsize="32" type="x64_eflags"/>
  <reg name="st0" bitsize="80" type="i387_ext"/>
</feature>"""
MORE = """<feature name="org.qemu.gdb.i386.sys">
  <reg name="cr3" bitsize="64" type="int" regnum="4"/>
</feature>"""


def _all(**values: int) -> Registers:
    return Registers({**dict.fromkeys(DEFAULT_LAYOUT.names, 0), **values})


class TestLayout:
    def test_from_target_xml(self) -> None:
        layout = RegisterLayout.from_target_xml([CORE, MORE])
        assert layout.names == ("rax", "rip", "eflags", "st0", "cr3")
        assert layout.sizes_bytes == (8, 8, 4, 10, 8)
        assert layout.offsets_bytes == (0, 8, 16, 20, 30)
        assert layout.number["cr3"] == 4

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ("<feature>", "is not XML"),
            ("", "is not XML"),
            ("<feature/>", "has no registers"),
            ('<feature><reg name="a"/></feature>', "bad <reg>"),
            ('<feature><reg bitsize="64"/></feature>', "bad <reg>"),
            ('<feature><reg name="a" bitsize="x"/></feature>', "bad <reg>"),
            ('<feature><reg name="a" bitsize="64" regnum="3"/></feature>', "out of order"),
            ('<feature><reg name="a" bitsize="0"/></feature>', "out of order"),
            ('<feature><reg name="a" bitsize="99999999"/></feature>', "out of order"),
            ('<!DOCTYPE f [<!ENTITY a "b">]><feature/>', "entities"),
        ],
    )
    def test_bad_descriptions(self, document, message) -> None:
        with pytest.raises(ProtocolError, match=message):
            RegisterLayout.from_target_xml([document])

    def test_no_documents(self) -> None:
        with pytest.raises(ProtocolError, match="has no registers"):
            RegisterLayout.from_target_xml([])

    def test_unpack_default_layout(self) -> None:
        packet = b"".join(
            (n + 1).to_bytes(size, "little") for n, size in enumerate(DEFAULT_LAYOUT.sizes_bytes)
        )
        values = DEFAULT_LAYOUT.unpack(packet)
        assert values == {name: n + 1 for n, name in enumerate(DEFAULT_LAYOUT.names)}
        assert list(values)[:8] == ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"]

    def test_unpack_other_layout(self) -> None:
        layout = RegisterLayout.from_target_xml([CORE, MORE])
        packet = bytes(range(38))
        values = layout.unpack(packet)
        assert values["rip"] == 0x0F0E0D0C0B0A0908
        assert values["eflags"] == 0x13121110
        assert values["st0"] == int.from_bytes(packet[20:30], "little")
        assert values["cr3"] == int.from_bytes(packet[30:38], "little")

    @pytest.mark.parametrize("length", [0, 7, 8, 17 * 8 - 1, 17 * 8, 17 * 8 + 4, 17 * 8 + 5])
    def test_a_short_packet_holds_fewer(self, length) -> None:
        values = DEFAULT_LAYOUT.unpack(b"\x11" * length)
        whole = sum(
            offset + size <= length
            for offset, size in zip(
                DEFAULT_LAYOUT.offsets_bytes, DEFAULT_LAYOUT.sizes_bytes, strict=True
            )
        )
        assert tuple(values) == DEFAULT_LAYOUT.names[:whole]

    def test_missing_registers_are_not_available(self) -> None:
        regs = Registers(DEFAULT_LAYOUT.unpack(bytes(8 * 17)))
        assert regs.rip == 0
        assert "cs" not in regs
        with pytest.raises(AttributeError, match=r"^register 'cs' is not available at this stop$"):
            _ = regs.cs
        with pytest.raises(AttributeError, match=r"^register 'cs' is not available at this stop$"):
            regs.cs = 0x10
        assert regs.changed == {}


class TestNames:
    def test_both_families_are_one_register(self) -> None:
        regs = _all(rdi=5, eflags=0x246)
        assert (regs.di, regs["di"], regs["rdi"], regs.flags) == (5, 5, 5, 0x246)
        regs.ip = 0x1000
        regs["sp"] = 0x2000
        assert regs.rip == 0x1000
        assert regs.rsp == 0x2000
        assert regs.changed == {"rip": 0x1000, "rsp": 0x2000}
        assert "ax" in regs
        assert "rax" in regs
        assert "eax" not in regs
        assert 3 not in regs

    def test_unknown_names(self) -> None:
        regs = _all()
        with pytest.raises(AttributeError, match="'xmm0'"):
            _ = regs.xmm0
        with pytest.raises(AttributeError, match="'xmm0'"):
            regs.xmm0 = 1
        with pytest.raises(KeyError, match="'xmm0'"):
            _ = regs["xmm0"]

    def test_arguments(self) -> None:
        regs = _all(**{name: n for n, name in enumerate(ARGUMENT_REGISTERS)})
        assert [regs.argument(n) for n in range(6)] == list(range(6))
        with pytest.raises(IndexError):
            regs.argument(6)

    def test_dir_completes_both_families(self) -> None:
        names = dir(_all())
        assert {"di", "rdi", "flags", "eflags", "argument", "changed"} <= set(names)

    def test_iterates_over_names(self) -> None:
        assert tuple(_all()) == DEFAULT_LAYOUT.names

    def test_repr(self) -> None:
        assert repr(_all(rip=0x10, rsp=0x20)) == "<Registers rip=0x10 rsp=0x20>"


class TestChanges:
    def test_nothing_changed_at_first(self) -> None:
        assert _all(rax=1).changed == {}

    def test_values_are_cut_to_the_register(self) -> None:
        regs = _all()
        regs.rax = -1
        regs.rbx = 1 << 64
        regs.eflags = 1 << 32 | 2
        assert regs.changed == {"rax": (1 << 64) - 1, "rbx": 0, "eflags": 2}

    def test_copy_is_independent(self) -> None:
        regs = _all(rax=1)
        regs.rax = 2
        copy = regs.copy()
        assert copy.rax == 2
        assert copy.changed == {}
        copy.rax = 3
        assert regs.rax == 2

    def test_restore_writes_what_differs(self) -> None:
        regs = _all(rax=1, rip=0x1000, eflags=2, cs=0x10)
        saved = regs.copy()
        regs_after = _all(rax=9, rip=0x1000, eflags=6, cs=0x33)
        regs_after.restore(saved)
        assert regs_after.changed == {"rax": 1, "eflags": 2}
        assert regs_after.cs == 0x33

    def test_restore_after_a_write(self) -> None:
        regs = _all(rax=1)
        saved = regs.copy()
        regs.rax = 5
        regs.restore(saved)
        assert regs.rax == 1
