"""``python -m kgdbx.machine``: fetch QEMU and all kernels, so that tests need no network."""

from kgdbx.machine.kernels import FLAVOURS, fetch_kernel
from kgdbx.machine.qemu import find_qemu


def main() -> None:
    """Fetch what is not there and say where it is."""
    print(find_qemu().path)
    for flavour in FLAVOURS:
        print(fetch_kernel(flavour.name).vmlinux)


if __name__ == "__main__":
    main()
