"""Transports to a kernel: memory, registers, breakpoints and run control."""
