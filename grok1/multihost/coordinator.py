"""The program in which all processes of a run meet, beside process 0.

First every process comes to its port and says who it is, in a line of JSON; when all are there and fit together, JAX's
coordination service takes over the port, and everybody may connect to that. The first connections stay, and who loses
its own without a word has died: all others hear of it at once.

It is a process of its own so that it outlives process 0 by a moment: a coordination service that ended with it would
take the other processes down with a stack trace each, before they could say why. It ends when nobody is connected any
more.

Run as a script, so that nothing but jaxlib is imported. Lines to a process are {"wait": N} for how many are still to
come, {"error": sentence}, {"go": [[host, machine, address], ...]}, {"loading": [[done, total], ...]}, {"failed":
[process, sentence]} and {"end": code}; lines from it, after the first, {"loading": [done, total]}, {"failed":
sentence} and {"end": code}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

TICK_SECONDS = 0.5
_LINE_BYTES = 1 << 20
_LOOPBACK = ("127.", "::1")


class Coordinator:
    """Who has come, and what becomes of them."""

    def __init__(self, count: int, timeout: float, silence: float):
        """For `count` processes, of which none may be silent for more than `silence` seconds."""
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
        """Meets, hosts the service, and watches until nobody is left."""
        try:
            server = await asyncio.start_server(self.serve, host, port, limit=_LINE_BYTES, reuse_address=True)
        except OSError as error:
            print(error.strerror or error, flush=True)
            return
        print("ready", flush=True)
        begin = time.monotonic()
        while len(self.hellos) < self.count and time.monotonic() - begin < self.timeout and not self.over:
            self.changed.clear()
            self.tell({"wait": self.count - len(self.hellos)})
            await self.wait_for_change(self.timeout - (time.monotonic() - begin))
        server.close()
        missing = [process for process in range(self.count) if process not in self.hellos]
        fault = None if self.over else self.missing(missing) if missing else self.difference()
        service = None
        if self.over or fault is not None:
            self.tell(
                {"error": fault or "process 0 has ended before all processes were there: start all of them again"}
            )
            self.over = True
        else:
            service = self.start_service(host, port)
            self.running = True
            self.seen = dict.fromkeys(self.seen, time.monotonic())
            told = [[hello["host"], hello["machine"], self.address(i)] for i, hello in sorted(self.hellos.items())]
            self.tell({"go": told})
        while self.writers:
            self.changed.clear()
            await self.wait_for_change(TICK_SECONDS)
            now = time.monotonic()
            self.tell({"loading": self.loading})
            for process in [process for process in self.writers if now - self.seen[process] > self.silence]:
                self.failed(process, f"it has not answered for {self.silence:.0f} seconds")
                self.leave(process)
        del service  # which ends it

    def address(self, process: int) -> str:
        """The address at which others can reach a process: where it comes from.

        Processes of this host may come by the loopback address. Where others have reached this host is theirs then.
        """
        ends = {i: writer.get_extra_info("peername")[0] for i, writer in self.writers.items()}
        elsewhere = [i for i, end in ends.items() if not _plain(end).startswith(_LOOPBACK)]
        if process in elsewhere or not elsewhere:
            return _plain(ends[process])
        return _plain(self.writers[elsewhere[0]].get_extra_info("sockname")[0])

    def start_service(self, host: str, port: int) -> Any:
        """JAX's coordination service."""
        from jaxlib import _jax

        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return _jax.get_distributed_runtime_service(address, self.count)

    async def wait_for_change(self, seconds: float) -> None:
        """Waits until something has happened."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), max(0.0, seconds))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first line to its end; who says nothing sensible at first is nobody."""
        process = None
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), self.timeout))
            process = hello["process"]
            if process in self.hellos or not 0 <= process < self.count or hello["processes"] != self.count:
                other = self.hellos.get(process, {}).get("host", "another")
                fault = f"{hello['host']} says that it is process {process} of {hello['processes']}, "
                fault += (
                    f"which {other} is already: give every process a --process-id of its own"
                    if hello["processes"] == self.count
                    else f"and process 0 that there are {self.count}: start every process with the same --num-processes"
                )
                writer.write(json.dumps({"error": fault}).encode() + b"\n")
                process = None
                return
            self.hellos[process], self.writers[process] = hello, writer
            self.seen[process] = time.monotonic()
            self.changed.set()
            while line := await reader.readline():
                self.seen[process] = time.monotonic()
                self.heard(process, json.loads(line))
            if not self.over:
                self.failed(process, "it ended unexpectedly")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if process is not None and not self.over:
                self.failed(process, f"its connection failed ({error})")
        finally:
            if process is not None:
                self.leave(process)
            writer.close()

    def heard(self, process: int, told: dict[str, Any]) -> None:
        """What a process has to say."""
        if "loading" in told:
            self.loading = [told["loading"] if i == process else at for i, at in enumerate(self.loading)]
        elif "failed" in told:
            self.failed(process, told["failed"])
        elif "end" in told:
            self.over = True
            self.tell({"end": told["end"]})

    def failed(self, process: int, sentence: str) -> None:
        """Ends the run because of a process. Before it has begun, there is only one fewer."""
        if not self.running and process != 0:
            self.hellos.pop(process, None)
            self.changed.set()
        elif not self.over:
            self.over = True
            self.tell({"failed": [process, sentence]})

    def leave(self, process: int) -> None:
        """Forgets a connection."""
        if process in self.writers:
            self.writers.pop(process).close()
        self.over |= process == 0
        self.changed.set()

    def tell(self, told: dict[str, Any]) -> None:
        """Says something to everybody."""
        for writer in self.writers.values():
            writer.write(json.dumps(told).encode() + b"\n")

    def missing(self, processes: list[int]) -> str:
        """The sentence about who has not come."""
        names = ", ".join(map(str, processes))
        who = f"process {names} has" if len(processes) == 1 else f"processes {names} have"
        return (
            f"{who} not come within {self.timeout:.0f} seconds, of {self.count} that were to: start every process with "
            "the same --coordinator and --num-processes, and see that its host reaches this address"
        )

    def difference(self) -> str | None:
        """The sentence about what is not the same in all processes; None if they fit together."""
        first = self.hellos[0]
        for process, other in sorted(self.hellos.items()):
            for kind, remedy in (
                ("versions", "install the same version on both"),
                ("options", "start every process with the same options"),
            ):
                mine, theirs = first[kind], other[kind]
                for name in [*mine, *(name for name in theirs if name not in mine)]:
                    if mine.get(name) != theirs.get(name):
                        return (
                            f"process {process} ({other['host']}) has {name} {_shown(theirs.get(name))} and process 0 "
                            f"({first['host']}) has {_shown(mine.get(name))}: {remedy}"
                        )
        return None


def _plain(address: str) -> str:
    """An address of version 4 as such, though it came by version 6."""
    return address.removeprefix("::ffff:")


def _shown(value: Any) -> str:
    if value is None:
        return "not at all"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


if __name__ == "__main__":
    _host, _port, _count, _timeout, _silence = sys.argv[1:]
    asyncio.run(Coordinator(int(_count), float(_timeout), float(_silence)).run(_host, int(_port)))
