"""The coordinator: a program at which all processes of a run meet. Process 0 starts it.

Each process connects to its port and introduces itself with a line of JSON. When all have arrived and fit together,
JAX's coordination service takes over the port. The first connections stay open: if one closes without notice, its
process has died, and all others are notified at once.

The coordinator is a separate process so that it outlives process 0. If the coordination service ended with process 0,
the others would abort with a stack trace before they could report why. It ends when no process is connected.

Messages are lines of JSON. From the coordinator: {"wait": N} (processes still missing), {"error": sentence}, {"go":
[[host, machine, address], ...]}, {"loading": [[done, total], ...]}, {"failed": [process, sentence]} and {"end": code}.
From a process, after its introduction: {"loading": [done, total]}, {"failed": sentence} and {"end": code}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

from grok1.multihost.jax_private import start_coordination_service

TICK_SECONDS = 0.5
_LINE_BYTES = 1 << 20
_LOOPBACK = ("127.", "::1")


class Coordinator:
    """The connected processes and the state of their run."""

    def __init__(self, count: int, timeout: float, silence: float):
        """Create a coordinator.

        Args:
            count: number of processes.
            timeout: seconds to wait for all processes to connect.
            silence: seconds without a message after which a process is considered dead.
        """
        self.count = count
        self.timeout = timeout
        self.silence = silence
        self.hellos: dict[int, dict[str, Any]] = {}
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.seen: dict[int, float] = {}
        self.loading: list[list[int]] = [[0, 0]] * count
        self.over = False
        self.running = False
        self.changed = asyncio.Event()

    async def run(self, host: str, port: int) -> None:
        """Wait for the processes, run the service, and watch until no process is connected."""
        try:
            server = await asyncio.start_server(self.serve, host, port, limit=_LINE_BYTES, reuse_address=True)
        except OSError as error:
            print(error.strerror or error, flush=True)
            return
        print("ready", flush=True)
        begin = time.monotonic()
        while len(self.hellos) < self.count and time.monotonic() - begin < self.timeout and not self.over:
            self.changed.clear()
            self.send({"wait": self.count - len(self.hellos)})
            await self.wait_for_change(self.timeout - (time.monotonic() - begin))
        server.close()
        missing = [process for process in range(self.count) if process not in self.hellos]
        fault = None if self.over else self.missing(missing) if missing else self.mismatch()
        service = None
        if self.over or fault is not None:
            self.send(
                {"error": fault or "process 0 ended before all processes had connected: start all processes again"}
            )
            self.over = True
        else:
            service = start_coordination_service(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", self.count)
            self.running = True
            self.seen = dict.fromkeys(self.seen, time.monotonic())
            machines = [[hello["host"], hello["machine"], self.address(i)] for i, hello in sorted(self.hellos.items())]
            self.send({"go": machines})
        while self.writers:
            self.changed.clear()
            await self.wait_for_change(TICK_SECONDS)
            now = time.monotonic()
            self.send({"loading": self.loading})
            for process in [process for process in self.writers if now - self.seen[process] > self.silence]:
                self.fail(process, f"no answer for {self.silence:.0f} seconds")
                self.leave(process)
        del service  # stops it

    def address(self, process: int) -> str:
        """Return the address at which others can reach a process: normally the address that it connects from.

        Processes on this host may connect from the loopback address. Their address is then the one at which other hosts
        have reached this host.
        """
        ends = {i: writer.get_extra_info("peername")[0] for i, writer in self.writers.items()}
        elsewhere = [i for i, end in ends.items() if not _plain(end).startswith(_LOOPBACK)]
        if process in elsewhere or not elsewhere:
            return _plain(ends[process])
        return _plain(self.writers[elsewhere[0]].get_extra_info("sockname")[0])

    async def wait_for_change(self, seconds: float) -> None:
        """Wait until a process connects or disconnects, at most this long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), max(0.0, seconds))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection until it ends; one whose first line is not an introduction is ignored."""
        process = None
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), self.timeout))
            process = hello["process"]
            if process in self.hellos or not 0 <= process < self.count or hello["processes"] != self.count:
                fault = f"{hello['host']} was started as process {process} of {hello['processes']}, "
                if hello["processes"] != self.count:
                    fault += f"but process 0 expects {self.count} processes: start all with the same --num-processes"
                elif process in self.hellos:
                    other = self.hellos[process]["host"]
                    fault += f"as {other} already was: give each process a different --process-id"
                else:
                    fault += f"expected an index from 0 to {self.count - 1}: correct --process-id"
                writer.write(json.dumps({"error": fault}).encode() + b"\n")
                process = None
                return
            self.hellos[process], self.writers[process] = hello, writer
            self.seen[process] = time.monotonic()
            self.changed.set()
            while line := await reader.readline():
                self.seen[process] = time.monotonic()
                self.handle(process, json.loads(line))
            if not self.over:
                self.fail(process, "ended unexpectedly")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if process is not None and not self.over:
                self.fail(process, f"the connection failed ({error})")
        finally:
            if process is not None:
                self.leave(process)
            writer.close()

    def handle(self, process: int, message: dict[str, Any]) -> None:
        """Handle a message of a process."""
        if "loading" in message:
            self.loading = [message["loading"] if i == process else at for i, at in enumerate(self.loading)]
        elif "failed" in message:
            self.fail(process, message["failed"])
        elif "end" in message:
            self.over = True
            self.send({"end": message["end"]})

    def fail(self, process: int, sentence: str) -> None:
        """End the run because a process failed; before the run has started, only wait for the process again."""
        if not self.running and process != 0:
            self.hellos.pop(process, None)
            self.changed.set()
        elif not self.over:
            self.over = True
            self.send({"failed": [process, sentence]})

    def leave(self, process: int) -> None:
        """Close and forget a connection."""
        if process in self.writers:
            self.writers.pop(process).close()
        self.over |= process == 0
        self.changed.set()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to all processes."""
        for writer in self.writers.values():
            writer.write(json.dumps(message).encode() + b"\n")

    def missing(self, processes: list[int]) -> str:
        """Return the error for processes that have not connected."""
        names = ", ".join(map(str, processes))
        return (
            f"process{'es' if len(processes) > 1 else ''} {names} of {self.count} did not connect within "
            f"{self.timeout:.0f} seconds: start all processes with the same --coordinator and --num-processes, and "
            "check that their hosts can reach this address"
        )

    def mismatch(self) -> str | None:
        """Return the error for the first value that differs between processes; None if all agree."""
        first = self.hellos[0]
        for process, other in sorted(self.hellos.items()):
            for kind, remedy in (
                ("versions", "install the same version on both hosts"),
                ("options", "start all processes with the same options"),
            ):
                mine, theirs = first[kind], other[kind]
                for name in [*mine, *(name for name in theirs if name not in mine)]:
                    if mine.get(name) != theirs.get(name):
                        return (
                            f"{name} differs: {_shown(theirs.get(name))} in process {process} ({other['host']}), "
                            f"{_shown(mine.get(name))} in process 0 ({first['host']}); {remedy}"
                        )
        return None


def _plain(address: str) -> str:
    """Return an IPv4 address without its IPv6 prefix."""
    return address.removeprefix("::ffff:")


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


if __name__ == "__main__":
    _host, _port, _count, _timeout, _silence = sys.argv[1:]
    asyncio.run(Coordinator(int(_count), float(_timeout), float(_silence)).run(_host, int(_port)))
