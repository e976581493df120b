"""Frozen facts of x86-64: registers, calling convention, instructions, page tables."""
