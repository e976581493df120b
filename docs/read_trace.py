"""Print a trace of kgdbx from a recording, a FIFO or a socket. The format: trace_format.md."""

import json
import socket
import struct
import sys
from pathlib import Path


def show(field, record, mask):
    is_bad = int.from_bytes(record[mask:][:8], "little") >> field.get("fault", 64) & 1
    if is_bad or "value" in field:
        return field.get("value", "(fault)")
    data, kind = record[field["offset"] :][: field["size"]], field["kind"]
    if kind not in "usx" or "count" in field:
        return data.split(b"\0")[0] if kind == "string" else data.hex(" ")
    low, width = field.get("bits", (0, 8 * len(data)))
    number = int.from_bytes(data, "little", signed="signed" in field) >> low & (1 << width) - 1
    number -= number >> width - 1 << width if kind == "s" else 0
    return hex(number) if kind == "x" else number


path, connection, probes = Path(sys.argv[1]), socket.socket(socket.AF_UNIX), {}
if is_socket := path.is_socket():
    connection.connect(str(path))
file = connection.makefile("rb") if is_socket else path.open("rb")
magic, *_, tsc_base, ns_base, mult, shift = struct.unpack("<8sHHIQQQI20x", file.read(64))
assert magic == b"KGDBXTRC", "this is not the start of a trace"
while len(head := file.read(16)) == 16:
    size, kind, _, step, count = struct.unpack("<IHHII", head)
    data = file.read(size)
    if kind == 1:
        probes |= {probe["id"]: probe for probe in map(json.loads, data.split(b"\n")[:count])}
    for record in [data[n : n + step] for n in range(0, size, step)] if kind == 2 else ():
        _, tsc, pid, _, number, cpu, _, comm = struct.unpack_from("<QQIIIHH16s", record)
        probe, ns = probes[number], ns_base + ((tsc - tsc_base) * mult >> shift)
        values = [f"{f['name']}={show(f, record, probe['faults'])}" for f in probe["fields"]]
        print(comm.split(b"\0")[0], pid, f"[{cpu:03}]", ns, probe["name"], *values)
    if kind in (3, 4):
        print(data.decode() if kind == 4 else f"LOST {struct.unpack('<QIi', data)[0]} EVENTS")
