"""Interrupt handling: graceful shutdown, and Ctrl-C while the main thread is inside XLA and cannot handle it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_GRACE_SECONDS = 0.7
_BLOCK_LEFT = b"\0"


@contextlib.contextmanager
def interrupts_end_within_a_second(
    *, patient: bool, hint: Callable[[], None], leave: Callable[[], None]
) -> Iterator[None]:
    """End the process with status 130 if the block is not left within a second after SIGINT or SIGTERM.

    Python raises KeyboardInterrupt only between two bytecodes of the main thread, and a compilation is one bytecode.
    Therefore a second thread also receives the signal, and ends the process if the exception is not raised in time.

    Args:
        patient: whether the first signal only calls `hint`.
        hint: informs the user that a second signal ends the process; called from another thread.
        leave: restores the terminal; called from another thread.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    report_unraisable = sys.unraisablehook
    # If the exception is raised in a callback, Python only reports it; the watcher then ends the process.
    sys.unraisablehook = lambda found: None if found.exc_type is KeyboardInterrupt else report_unraisable(found)
    watcher = threading.Thread(target=_watch, args=(reader, patient, hint, leave), name="grok1-interrupt", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        sys.unraisablehook = report_unraisable
        signal.set_wakeup_fd(before)
        os.write(writer, _BLOCK_LEFT)
        watcher.join()
        os.close(writer)
        os.close(reader)


def _watch(reader: int, patient: bool, hint: Callable[[], None], leave: Callable[[], None]) -> None:
    signals, timeout = 0, None
    while True:
        if not select.select([reader], [], [], timeout)[0]:
            if patient and signals == 1:
                hint()
                timeout = None
                continue
            leave()
            os._exit(130)
        for byte in os.read(reader, 64):
            if byte == _BLOCK_LEFT[0]:
                return
            if byte in (signal.SIGINT, signal.SIGTERM):
                signals += 1
                timeout = _GRACE_SECONDS


@contextlib.contextmanager
def interrupts_end_at_once(leave: Callable[[], None]) -> Iterator[None]:
    """Within this block, SIGINT ends the process immediately with status 130.

    Used while JAX is imported: an exception raised inside its extension modules crashes the process.

    Args:
        leave: restores the terminal.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def end(number: int, frame: object) -> None:
        leave()
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class GracefulShutdown:
    """Request a stop at the first SIGINT or SIGTERM within `graceful`, and raise `KeyboardInterrupt` at the second.

    Outside `graceful`, the first signal also raises `KeyboardInterrupt`.

    Attributes:
        requested: set by the first signal.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._graceful = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals within this block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Within this block, the first signal only sets `requested`."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def _handle(self, number: int, frame: object) -> None:
        if not self._graceful or self.requested.is_set():
            raise KeyboardInterrupt
        self.requested.set()
