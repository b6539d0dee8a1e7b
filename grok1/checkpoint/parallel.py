"""Work on many files by a few threads, with progress in bytes, that stops at once when asked to."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Advance = Callable[[int], None]
"""Called by a worker after each piece with the bytes it read; raises when the work is to stop."""

ByteProgress = Callable[[int, int], None]
"""Called with the bytes read or written so far and the total."""

_MAX_THREADS = 8  # more readers make a disk slower; hashing and checking keep up with it long before


class _Stopped(Exception):
    """Nobody waits for the result any more."""


def in_parallel(
    items: Sequence[Item],
    work: Callable[[Item, Advance], Result],
    total: int,
    progress: ByteProgress | None,
    threads: int | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Runs `work` for each item in threads, and yields the results as they come, each with its item.

    If the consumer stops, by closing the iterator or by an exception such as KeyboardInterrupt, the workers end after
    the piece that they are at.

    Args:
        items: begun in this order.
        work: gets an item and `advance`, which it calls after every few megabytes.
        total: bytes of all items.
        progress: called in the consumer's thread.
        threads: how many; by default one a processor, but at least 2 and at most 8.

    Raises:
        Exception: what `work` raises.
    """
    events: queue.SimpleQueue[int | tuple[Item, Future[Result]]] = queue.SimpleQueue()
    stopping = threading.Event()

    def advance(count: int) -> None:
        if stopping.is_set():
            raise _Stopped
        events.put(count)

    def run(item: Item) -> Result:
        advance(0)  # not begun if nobody waits
        return work(item, advance)

    def submit(item: Item) -> None:
        pool.submit(run, item).add_done_callback(lambda future: events.put((item, future)))

    pool = ThreadPoolExecutor(
        threads or min(_MAX_THREADS, max(2, os.cpu_count() or 2)), thread_name_prefix="grok1-read"
    )
    try:
        for item in items:
            submit(item)
        done, pending = 0, len(items)
        while pending:
            event = events.get()
            if isinstance(event, int):
                done += event
                if progress and event:
                    progress(min(done, total), total)
            else:
                pending -= 1
                yield event[0], event[1].result()
    finally:
        stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)
