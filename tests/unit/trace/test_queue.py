"""A queue that is full drops whole frames, and what was dropped is told where it is missing."""

import random

from kgdbx.trace.binary import FRAME_HEADER, LOST, Frame, FrameType
from kgdbx.trace.queue import Delivery, FrameQueue


def records(first: int, count: int) -> Frame:
    payload = b"".join(n.to_bytes(8, "little") for n in range(first, first + count))
    header = FRAME_HEADER.pack(len(payload), FrameType.RECORDS, 0, 8, count)
    return Frame((header, payload), len(header) + len(payload), count)


def take(queue: FrameQueue, size_bytes: int) -> bytes:
    data = b"".join(queue.parts())[:size_bytes]
    queue.taken(len(data))
    return data


def parse(stream: bytes) -> list[int | str]:
    """Numbers received, and what was lost between them."""
    found: list[int | str] = []
    while stream:
        size, kind, _, _, _ = FRAME_HEADER.unpack_from(stream)
        payload, stream = stream[16 : 16 + size], stream[16 + size :]
        assert len(payload) == size
        if kind == FrameType.LOST:
            assert LOST.unpack(payload)[1:] == (1, -1)
            found.append(f"lost {LOST.unpack(payload)[0]}")
        else:
            found += [int.from_bytes(payload[at : at + 8], "little") for at in range(0, size, 8)]
    return found


def test_first_in_first_out() -> None:
    queue = FrameQueue(1000)
    assert not queue
    queue.offer(records(0, 3))
    queue.offer(records(3, 2))
    assert queue
    stream = b""
    while queue:
        stream += take(queue, 7)
    assert parse(stream) == [0, 1, 2, 3, 4]
    assert queue.parts() == []
    assert queue.delivery(connected=True) == Delivery(5, 5, 0, True)


def test_full() -> None:
    queue = FrameQueue(200)
    for first in range(0, 80, 8):
        queue.offer(records(first, 8))  # 80 bytes each: two fit
    assert queue.delivery(connected=True) == Delivery(80, 0, 64, True)
    stream = take(queue, 1000)
    assert queue, "it is told once there is room, also if nothing more comes"
    stream += take(queue, 1000)
    queue.offer(records(80, 8))
    stream += take(queue, 1000)
    assert parse(stream) == [*range(16), "lost 64", *range(80, 88)]


def test_what_has_to_arrive_gets_in() -> None:
    queue = FrameQueue(100)
    queue.offer(records(0, 8))
    queue.offer(records(8, 8))
    probes = Frame((FRAME_HEADER.pack(0, FrameType.PROBES, 0, 0, 0),), 16)
    queue.offer(probes)
    assert parse(take(queue, 1000)) == [*range(8), "lost 8"]


def test_discarded() -> None:
    queue = FrameQueue(200)
    for first in (0, 8, 16):
        queue.offer(records(first, 8))
    take(queue, 81)  # the second has begun: it does not count as sent
    queue.discard()
    assert not queue
    assert queue.delivery(connected=False) == Delivery(24, 8, 16, False)


def test_nothing_is_unaccounted_for() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        queue = FrameQueue(rng.choice((100, 1000, 5000)))
        stream, offered = b"", 0
        for _ in range(300):
            if rng.random() < 0.6:
                count = rng.randint(1, 40)
                queue.offer(records(offered, count))
                offered += count
            else:
                stream += take(queue, rng.randint(1, 1500))
        queue.tell_lost()
        while queue:
            stream += take(queue, 10_000)
        expected = 0
        for item in parse(stream):
            # Exactly in its place: the numbers continue after what was lost.
            if isinstance(item, str):
                expected += int(item.split()[1])
            else:
                assert item == expected
                expected += 1
        assert expected == offered
        delivery = queue.delivery(connected=True)
        assert delivery.sent + delivery.lost == delivery.offered == offered
