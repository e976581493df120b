"""Kernels, QEMU and VMs: fetch, launch, snapshot and clone."""
