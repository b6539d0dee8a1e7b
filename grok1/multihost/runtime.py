"""JAX's distributed runtime, started and used: what processes tell each other, and who is still there.

Values and steps go through the key-value store of the runtime's coordination service. That is in a process of its own,
which also tells of processes that have died, see `grok1.multihost.coordinator`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grok1.config import VERSION
from grok1.errors import MultihostError
from grok1.multihost import coordinator as coordinator_program
from grok1.multihost.cluster import Cluster
from grok1.multihost.coordinator import TICK_SECONDS

SILENCE_SECONDS = 20.0
"""How long a process may be silent before it is taken for dead."""

_CONNECT_SECONDS = 60  # for JAX's clients, once all processes have met
_BLOCK = 512  # steps whose messages are deleted together, once everybody has them
_FAREWELL_SECONDS = 5.0
_POLL_MILLISECONDS = 300

End = Callable[[str | None, int], None]
"""Ends this process from any thread, with a sentence for the user or none, and an exit code."""


class ToldError(MultihostError):
    """Processes that do not fit together: all of them learn of it, process 0 among them."""


class Runtime:
    """One process of a run, connected to the others.

    Attributes:
        cluster: who takes part, and who this is.
        hosts: for each process the name of its host.
        host_of: for each process a number of its host, counted from 0 in order of the processes.
        loading: for each process the bytes that it has loaded, and those that it has to load.
    """

    def __init__(self, cluster: Cluster, link: Link, machines: Sequence[tuple[str, str, str]], speaks: bool):
        """Use `join`.

        Args:
            cluster: who takes part.
            link: to the coordinator.
            machines: for each process its host's name, what tells it from others, and an address that others reach.
            speaks: whether it tells of others' deaths even if it is not process 0.
        """
        self.cluster = cluster
        self._speaks = speaks
        self.hosts = [host for host, _, _ in machines]
        keys = [(host, machine) for host, machine, _ in machines]
        self.host_of = [list(dict.fromkeys(keys)).index(key) for key in keys]
        self.loading: list[tuple[int, int]] = [(0, 0)] * cluster.num_processes
        self._address = machines[cluster.process_id][2]
        self._client: Any = None
        self._link = link
        self._exchanges: dict[str, int] = {}
        self._steps = 0
        self._loaded = (0, 0)
        self._over = threading.Lock()  # taken for good by what ends this process
        self._closed = threading.Event()
        self._left = False

    @property
    def process_id(self) -> int:
        """Which process this is."""
        return self.cluster.process_id

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which has the user."""
        return self.process_id == 0

    def name_of(self, process: int) -> str:
        """What users are told of a process."""
        return f"process {process} ({self.hosts[process]})"

    # Values

    def put(self, key: str, value: Any) -> None:
        """Gives a value, anything that JSON holds, a name for all processes."""
        self._client.key_value_set_bytes(f"grok1/{key}", json.dumps(value).encode())

    def get(self, key: str) -> Any:
        """Waits for a value. If it never comes, because a process has died, this process ends."""
        return json.loads(self._get(key))

    def _get(self, key: str, on_wait: Callable[[], None] = lambda: None) -> bytes:
        while True:
            try:
                value: bytes = self._client.blocking_key_value_get_bytes(f"grok1/{key}", _POLL_MILLISECONDS)
                return value
            except Exception as error:  # jax.errors.JaxRuntimeError
                if not str(error).startswith("DEADLINE_EXCEEDED"):
                    raise
                on_wait()

    def exchange(self, name: str, value: Any, on_wait: Callable[[], None] = lambda: None) -> list[Any]:
        """Tells all processes a value and learns theirs, in order of the processes; every process calls it.

        Args:
            name: of the value.
            value: anything that JSON holds.
            on_wait: is called several times a second while others have not told theirs.
        """
        count = self._exchanges[name] = self._exchanges.get(name, 0) + 1
        self.put(f"exchange/{name}/{count}/{self.process_id}", value)
        keys = [f"exchange/{name}/{count}/{process}" for process in range(self.cluster.num_processes)]
        return [json.loads(self._get(key, on_wait)) for key in keys]

    # Messages of process 0 to all others

    def send(self, message: bytes) -> None:
        """Sends a message to all other processes; they get all of them in this order."""
        block, place = divmod(self._steps, _BLOCK)
        if place == 0 and block >= 2:
            for process in range(1, self.cluster.num_processes):
                self.get(f"read/{block - 2}/{process}")
            for directory in ("step", "read"):
                self._client.key_value_delete(f"grok1/{directory}/{block - 2}/")
        self._client.key_value_set_bytes(f"grok1/step/{block}/{place}", message)
        self._steps += 1

    def receive(self) -> bytes:
        """Waits for the next message of process 0."""
        block, place = divmod(self._steps, _BLOCK)
        message = self._get(f"step/{block}/{place}")
        self._steps += 1
        if place == _BLOCK - 1:
            self.put(f"read/{block}/{self.process_id}", True)
        return message

    # Progress of loading

    def report_loading(self, done: int, total: int) -> None:
        """Lets process 0 know how much of its weights this process has loaded."""
        self._loaded = done, total

    def slowest(self) -> tuple[int, int, int]:
        """The process that has loaded the smallest share of its weights, and its bytes: loaded, and in all."""
        known = {process: at for process, at in enumerate(self.loading) if at[1]} | {self.process_id: self._loaded}
        process = min(known, key=lambda process: known[process][0] / max(1, known[process][1]))
        return process, *known[process]

    # Life and death

    def start(self, end: End) -> None:
        """Begins to watch the other processes, and connects to JAX's coordination service.

        Args:
            end: is called when another process is gone, or the run has ended.
        """
        threading.Thread(target=self._watch, args=(end,), name="grok1-watch", daemon=True).start()
        self._client = _connect(self.cluster, self._address)

    def _watch(self, end: End) -> None:
        heard = time.monotonic()
        try:
            while True:
                self._link.tell({"loading": self._loaded})
                told = self._link.hear(TICK_SECONDS)
                if told is None:
                    if time.monotonic() - heard > SILENCE_SECONDS:
                        break
                    continue
                heard = time.monotonic()
                if "loading" in told:
                    self.loading = [(done, total) for done, total in told["loading"]]
                elif "failed" in told and self._claim():
                    process, sentence = told["failed"]
                    self._end_by(process, sentence, end)
                elif "end" in told and not self.leads:
                    end(None, told["end"])
        except OSError:
            pass  # it is gone
        self._closed.set()
        if self._claim():
            first_of_host = self.host_of.index(self.host_of[self.process_id]) == self.process_id
            sentence = (
                f"the coordinator of process 0, {self.cluster.coordinator}, cannot be reached any more: see that its "
                "host is up, and start all processes again"
            )
            end(sentence if first_of_host or self._speaks else None, 1)

    def _end_by(self, process: int, sentence: str, end: End) -> None:
        """Ends this process because of another, or because this one was found to be gone."""
        told = f"{self.name_of(process)}: {sentence.rstrip('.')}"
        if ": " not in sentence:
            told += "; see why, and start all processes again"
        speaks = self.leads or self._speaks or (process == 0 and self.process_id == 1)
        end(told if speaks else None, 1)

    def _claim(self) -> bool:
        """Whether the caller is the first to end this process; others need do nothing."""
        return self._over.acquire(blocking=False)

    def fail(self, sentence: str) -> None:
        """Tells all processes that this one cannot go on, which ends them.

        Args:
            sentence: why, for process 0 to tell the user.
        """
        if self._claim():
            with contextlib.suppress(OSError):
                self._link.tell({"failed": sentence})

    def await_cause(self) -> None:
        """Waits until it is known whether another process has died, after an exchange with it has failed.

        If one has, this process ends here.
        """
        self._closed.wait(SILENCE_SECONDS + 5)

    def leave(self, code: int = 0, *, wait: bool = True) -> None:
        """Lets the others end, as all is done, or nobody wants more.

        Args:
            code: with what exit code.
            wait: if this process is being ended for the sake of another, whether to wait for that.
        """
        if self._left:
            return
        if self._claim():
            self._left = True
            with contextlib.suppress(OSError):
                self._link.tell({"end": code})
        elif wait:
            self._closed.wait(_FAREWELL_SECONDS)


class Link:
    """Lines of JSON to and from the coordinator."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._lock = threading.Lock()
        self._buffer = b""

    def tell(self, told: Mapping[str, Any]) -> None:
        """Says something.

        Raises:
            OSError: if the connection is broken.
        """
        with self._lock:
            self._connection.sendall(json.dumps(told).encode() + b"\n")

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """The next line, or None if there is none within that time.

        Raises:
            OSError: if the connection is broken.
        """
        while b"\n" not in self._buffer:
            if not select.select([self._connection], [], [], seconds)[0]:
                return None
            received = self._connection.recv(1 << 16)
            if not received:
                raise ConnectionResetError("the coordinator has closed the connection")
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        told: dict[str, Any] = json.loads(line)
        return told


def join(
    cluster: Cluster,
    options: Mapping[str, Any],
    on_wait: Callable[[str], None] = lambda text: None,
    *,
    speaks: bool = False,
) -> Runtime:
    """Meets the other processes and makes sure that all fit together; comes before JAX has devices.

    `Runtime.start` is to be called next.

    Args:
        cluster: who takes part.
        options: those that have to be the same everywhere, by name.
        on_wait: is called with what is being waited for.
        speaks: whether this process tells of others' deaths even if it is not process 0.

    Raises:
        MultihostError: if the coordinator cannot be started or reached, a process does not come, or one is of another
            version or has other options.
    """
    if cluster.process_id == 0:
        _start_coordinator(cluster)
    on_wait(f"waiting for process 0 at {cluster.coordinator}")
    link = _reach(cluster)
    link.tell(
        {
            "process": cluster.process_id,
            "processes": cluster.num_processes,
            "host": socket.gethostname(),
            "machine": _machine(),
            "versions": _versions(),
            "options": json.loads(json.dumps(dict(options), default=str)),
        }
    )
    end = time.monotonic() + cluster.timeout + SILENCE_SECONDS
    while time.monotonic() < end:
        try:
            told = link.hear(1.0) or {}
        except OSError:
            raise MultihostError(
                f"the coordinator at {cluster.coordinator} has ended before all {cluster.num_processes} processes were "
                "there: see what process 0 says, and start all again"
            ) from None
        if "error" in told:
            raise ToldError(told["error"])
        if "wait" in told:
            on_wait(f"waiting for {told['wait']} of {cluster.num_processes} processes")
        if "go" in told:
            on_wait("connecting the processes")
            return Runtime(cluster, link, [(host, machine, address) for host, machine, address in told["go"]], speaks)
    raise MultihostError(f"the coordinator at {cluster.coordinator} does not answer: start all processes again")


def _versions() -> dict[str, str]:
    packages = {"JAX": "jax", "jaxlib": "jaxlib"}
    return {"grok1": VERSION} | {name: importlib.metadata.version(it) for name, it in packages.items()}


def _machine() -> str:
    """What tells this machine from others, as far as the system says."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _start_coordinator(cluster: Cluster) -> None:
    """Starts the coordinator's program, which ends by itself.

    Raises:
        MultihostError: if it cannot listen.
    """
    host, silence = cluster.bind_address, SILENCE_SECONDS
    program = subprocess.Popen(
        # -P: a file of the folder that the user is in cannot stand for a module of Python
        [sys.executable, "-P", coordinator_program.__file__, host]
        + [str(number) for number in (cluster.port, cluster.num_processes, cluster.timeout, silence)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        start_new_session=True,  # an interrupt of the terminal is not for it
    )
    assert program.stdout is not None
    said = program.stdout.readline().strip()
    if said != "ready":
        raise MultihostError(
            f"the coordinator cannot listen at {host}, port {cluster.port} ({said or 'it ended'}): choose a free port, "
            "and an address of this host, with --coordinator"
        )


def _reach(cluster: Cluster) -> Link:
    """Connects to the coordinator, which may not be there yet.

    Raises:
        MultihostError: if it is not within the cluster's time.
    """
    end = time.monotonic() + cluster.timeout
    while True:
        try:
            connection = socket.create_connection((cluster.host, cluster.port), timeout=SILENCE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Link(connection)
        except OSError as error:
            if time.monotonic() > end:
                raise MultihostError(
                    f"process 0 cannot be reached at {cluster.coordinator} ({error.strerror or error}) for "
                    f"{cluster.timeout} seconds: see that it is started, and that this host reaches its address"
                ) from None
            time.sleep(0.2)


def _connect(cluster: Cluster, address: str) -> Any:
    """Connects to JAX's coordination service, as `jax.distributed.initialize` does where the service is elsewhere.

    Args:
        cluster: who takes part.
        address: at which other processes reach this one.
    """
    import jax
    from jax._src import distributed, xla_bridge
    from jaxlib import _jax

    client = _jax.get_distributed_runtime_client(
        cluster.coordinator,
        cluster.process_id,
        init_timeout=_CONNECT_SECONDS,
        shutdown_on_destruction=False,
        use_compression=True,
    )
    client.connect()
    state = distributed.global_state
    state.coordinator_address = cluster.coordinator
    state.num_processes = cluster.num_processes
    state.process_id = cluster.process_id
    state.client = client
    if cluster.local_devices is not None:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, ",".join(map(str, cluster.local_devices)))
    # The address of this host's own name, which would be taken otherwise, may be one that no other host can reach.
    collectives = _jax.make_gloo_tcp_collectives(distributed_client=client, hostname=address)
    xla_bridge.register_backend_factory(
        "cpu", lambda: xla_bridge.make_cpu_client(collectives), priority=0, fail_quietly=False
    )
    return client
