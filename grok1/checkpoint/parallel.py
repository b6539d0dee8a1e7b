"""Processes files in a few threads, with progress in bytes, until done or interrupted."""

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
"""Called by a worker with the bytes read since the last call; raises if the worker must stop."""

ByteProgress = Callable[[int, int], None]
"""Called with the bytes read or written so far and the total."""

_MAX_THREADS = 8  # more readers slow a disk down; these keep up with it


class _Stopped(Exception):
    """Raised in workers when nobody waits for their results."""


def in_parallel(
    items: Sequence[Item],
    work: Callable[[Item, Advance], Result],
    total: int,
    progress: ByteProgress | None,
    threads: int | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Run `work` for each item in threads, and yields items with their results in order of completion.

    If the consumer stops, by closing the iterator or by an exception such as KeyboardInterrupt, the workers stop at
    their next `advance`.

    Args:
        items: started in this order.
        work: called with an item and `advance`, which it calls every few megabytes.
        total: bytes of all items.
        progress: called in the consumer's thread.
        threads: by default one per CPU, but at least 2 and at most 8.

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
        advance(0)  # does not start if nobody waits
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
