"""Probes as machine code in the guest: compiled, linked, patched in, drained from its memory."""
