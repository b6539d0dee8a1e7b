"""A running process of several: exchanges values and steps with the others, and ends when one of them fails.

Values and steps go through the key-value store of JAX's coordination service. It runs in the coordinator's process,
which also reports processes that have died; see `grok1.multihost.coordinator`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from grok1.multihost import jax_private
from grok1.multihost.cluster import Cluster
from grok1.multihost.coordinator import TICK_SECONDS
from grok1.multihost.link import Link

if TYPE_CHECKING:
    from jax.sharding import Mesh

SILENCE_SECONDS = 20.0
"""A process that sends nothing for this long is considered dead."""

_CONNECT_SECONDS = 60  # for JAX's clients, once all processes have met
_BLOCK = 512  # steps whose messages are deleted together, once all processes have received them
_FAREWELL_SECONDS = 5.0
_POLL_MILLISECONDS = 300

End = Callable[[str | None, int], None]
"""Ends this process, from any thread, with a sentence for the user or None, and an exit code."""


class Runtime:
    """One process of a run, connected to the others.

    Attributes:
        cluster: the processes of the run.
        hosts: host name of each process.
        host_of: index of each process's host, counted from 0 in order of the processes.
        loading: for each process, the number of bytes of weights loaded and to load.
    """

    def __init__(self, cluster: Cluster, link: Link, machines: Sequence[tuple[str, str, str]], reports: bool):
        """Use `grok1.multihost.join.join`.

        Args:
            cluster: the processes of the run.
            link: connection to the coordinator.
            machines: for each process, the name of its host, an identifier of the machine, and its address.
            reports: whether this process reports the failure of others even if it is not process 0.
        """
        self.cluster = cluster
        self._reports = reports
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
        self._ended = threading.Lock()  # acquired, and never released, by the thread that ends this process
        self._closed = threading.Event()
        self._left = False

    @property
    def process_id(self) -> int:
        """Index of this process."""
        return self.cluster.process_id

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which reads input and prints results."""
        return self.process_id == 0

    def name_of(self, process: int) -> str:
        """Return the name of a process in messages."""
        return f"process {process} ({self.hosts[process]})"

    # Values

    def put(self, key: str, value: Any) -> None:
        """Store a value, which must be serializable as JSON, for all processes."""
        self._client.key_value_set_bytes(f"grok1/{key}", json.dumps(value).encode())

    def get(self, key: str) -> Any:
        """Wait for a value. If the process that should store it dies, this process ends."""
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
        """Gather a value of each process, in order of the processes; all processes must call this.

        Args:
            name: of the value.
            value: of this process, serializable as JSON.
            on_wait: called several times per second while values of others are missing.
        """
        count = self._exchanges[name] = self._exchanges.get(name, 0) + 1
        self.put(f"exchange/{name}/{count}/{self.process_id}", value)
        keys = [f"exchange/{name}/{count}/{process}" for process in range(self.cluster.num_processes)]
        return [json.loads(self._get(key, on_wait)) for key in keys]

    # Messages from process 0 to all others

    def send(self, message: bytes) -> None:
        """Send a message to all other processes, which receive messages in this order."""
        block, index = divmod(self._steps, _BLOCK)
        if index == 0 and block >= 2:
            for process in range(1, self.cluster.num_processes):
                self.get(f"read/{block - 2}/{process}")
            for directory in ("step", "read"):
                self._client.key_value_delete(f"grok1/{directory}/{block - 2}/")
        self._client.key_value_set_bytes(f"grok1/step/{block}/{index}", message)
        self._steps += 1

    def receive(self) -> bytes:
        """Wait for the next message of process 0."""
        block, index = divmod(self._steps, _BLOCK)
        message = self._get(f"step/{block}/{index}")
        self._steps += 1
        if index == _BLOCK - 1:
            self.put(f"read/{block}/{self.process_id}", True)
        return message

    # Progress of loading

    def report_loading(self, done: int, total: int) -> None:
        """Report the number of bytes of weights that this process has loaded, and of all that it loads."""
        self._loaded = done, total

    def slowest(self) -> tuple[int, int, int]:
        """Return the process that has loaded the smallest fraction of its weights, and its bytes: loaded, total."""
        known = {process: at for process, at in enumerate(self.loading) if at[1]} | {self.process_id: self._loaded}
        process = min(known, key=lambda process: known[process][0] / max(1, known[process][1]))
        return process, *known[process]

    # Start and end

    def start(self, end: End) -> None:
        """Start watching the other processes, and connect to JAX's coordination service.

        Args:
            end: called when another process has failed, or the run has ended.
        """
        threading.Thread(target=self._watch, args=(end,), name="grok1-watch", daemon=True).start()
        cluster = self.cluster
        self._client = jax_private.connect(
            cluster.coordinator, cluster.num_processes, cluster.process_id, _CONNECT_SECONDS
        )
        if cluster.local_devices is not None:
            import jax

            for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
                jax.config.update(name, ",".join(map(str, cluster.local_devices)))
        jax_private.use_gloo(self._client, self._address)

    def _watch(self, end: End) -> None:
        """Send signs of life, and call `end` when the run has ended or failed."""
        last_received = time.monotonic()
        try:
            while True:
                self._link.send({"loading": self._loaded})
                message = self._link.receive(TICK_SECONDS)
                if message is None:
                    if time.monotonic() - last_received > SILENCE_SECONDS:
                        break
                    continue
                last_received = time.monotonic()
                if "loading" in message:
                    self.loading = [(done, total) for done, total in message["loading"]]
                elif "failed" in message and self._claim_end():
                    process, sentence = message["failed"]
                    self._end_because_of(process, sentence, end)
                elif "end" in message and not self.leads:
                    end(None, message["end"])
        except OSError:
            pass  # the connection is broken
        self._closed.set()
        if self._claim_end():
            first_of_host = self.host_of.index(self.host_of[self.process_id]) == self.process_id
            sentence = (
                f"lost the connection to the coordinator of process 0 at {self.cluster.coordinator}: check that its "
                "host is running, then start all processes again"
            )
            end(sentence if first_of_host or self._reports else None, 1)

    def _end_because_of(self, process: int, sentence: str, end: End) -> None:
        """End this process because one failed, possibly this one by falling silent."""
        text = f"{self.name_of(process)}: {sentence.rstrip('.')}"
        if ": " not in sentence:
            text += "; check its output, then start all processes again"
        reports = self.leads or self._reports or (process == 0 and self.process_id == 1)
        end(text if reports else None, 1)

    def _claim_end(self) -> bool:
        """Return whether the caller is the first to end this process; all others need do nothing."""
        return self._ended.acquire(blocking=False)

    def fail(self, sentence: str) -> None:
        """End all processes because this one cannot continue.

        Args:
            sentence: the reason, which process 0 reports to the user.
        """
        if self._claim_end():
            with contextlib.suppress(OSError):
                self._link.send({"failed": sentence})

    def await_cause(self) -> None:
        """Wait, after communication has failed, until it is known whether another process has died.

        If one has, this process ends here.
        """
        self._closed.wait(SILENCE_SECONDS + 5)

    def leave(self, code: int = 0, *, wait: bool = True) -> None:
        """End the run for all processes, because the work is done or was interrupted.

        Args:
            code: exit code of the others.
            wait: if another thread is already ending this process, whether to wait for it.
        """
        if self._left:
            return
        if self._claim_end():
            self._left = True
            with contextlib.suppress(OSError):
                self._link.send({"end": code})
        elif wait:
            self._closed.wait(_FAREWELL_SECONDS)


def connect_devices(mesh: Mesh) -> None:
    """Connect the devices along each axis of a mesh by a collective operation, which all its processes must call.

    Devices are connected by their first collective operation. With Gloo, on CPUs, it fails if a process starts it more
    than 30 seconds after another, and compilation times may differ by more. Later operations wait for 30 minutes.
    """
    import jax

    def add_indices() -> tuple[jax.Array, ...]:
        return tuple(jax.lax.psum(jax.lax.axis_index(axis), axis) for axis in mesh.axis_names)

    add = jax.shard_map(add_indices, mesh=mesh, in_specs=(), out_specs=jax.sharding.PartitionSpec(), check_vma=False)
    jax.block_until_ready(jax.jit(add)())
