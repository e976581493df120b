"""Memory that the kernel has lost: found by a scan of its whole heap, or by following calls."""
