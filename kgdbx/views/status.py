"""Where a session stands: for prompts and tables that are always up to date."""

from typing import Any

from kgdbx.errors import KgdbxError
from kgdbx.probes.probe import Probe
from kgdbx.session import Session

__all__ = ("place", "status")


def status(session: Session, cpu: int) -> dict[str, Any]:
    """State, stop and probes.

    :param cpu: the vCPU to look at, if the kernel stands
    :return: ``target``, ``running``, ``slide``; ``cpu``, ``where``, ``comm`` and ``pid`` of a
        kernel that stands; ``probes``, and ``lost`` events
    """
    engine = session.resident.engine
    known = {
        "target": session.target.name,
        "running": session.target.running,
        "slide": session.kernel.slide,
        "lost": engine.lost() if engine.is_open else 0,
        "probes": [_probe(probe) for probe in session.probes],
    }
    return known if known["running"] else known | place(session, cpu)


def place(session: Session, cpu: int) -> dict[str, Any]:
    """Where a vCPU of a standing kernel is, and with what task; empty if it cannot be read."""
    try:
        registers = session.target.read_registers(cpu)
        found = {
            "cpu": cpu,
            "address": registers.rip,
            "where": session.kernel.symbolize(registers.rip),
        }
        task = session.kernel.current.task(registers)
        return found | {"comm": task.comm, "pid": task.pid}
    except KgdbxError:
        return {}


def _probe(probe: Probe) -> dict[str, Any]:
    return {
        "num": probe.number,
        "kind": probe.kind,
        "tier": probe.tier,
        "state": probe.state.value,
        "hits": probe.hits,
        "missed": probe.nmissed,
        "faults": probe.nfaults,
        "handler_s": probe.handler_s,
        "name": probe.name,
        "what": probe.text,
    }
