"""Join a run of several processes: start or reach the coordinator, and check that all processes fit together."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grok1.config import VERSION
from grok1.errors import MultihostError
from grok1.multihost.cluster import Cluster
from grok1.multihost.link import Link
from grok1.multihost.runtime import SILENCE_SECONDS, Runtime


class MismatchError(MultihostError):
    """Processes that do not fit together. Every process receives this error, so only process 0 needs to report it."""


def join(
    cluster: Cluster,
    options: Mapping[str, Any],
    on_wait: Callable[[str], None] = lambda text: None,
    *,
    reports: bool = False,
) -> Runtime:
    """Meet the other processes and check that all fit together. Call it before JAX initializes its devices.

    Call `Runtime.start` next.

    Args:
        cluster: the processes of the run.
        options: by name, those that must be the same in all processes.
        on_wait: called with a description of what is being waited for.
        reports: whether this process reports the failure of others even if it is not process 0.

    Raises:
        MultihostError: if the coordinator cannot be started or reached, a process does not arrive, or one has another
            version or other options.
    """
    if cluster.process_id == 0:
        _start_coordinator(cluster)
    on_wait(f"waiting for process 0 at {cluster.coordinator}")
    link = _reach_coordinator(cluster)
    link.send(
        {
            "process": cluster.process_id,
            "processes": cluster.num_processes,
            "host": socket.gethostname(),
            "machine": _machine_id(),
            "versions": _versions(),
            "options": json.loads(json.dumps(dict(options), default=str)),
        }
    )
    end = time.monotonic() + cluster.timeout + SILENCE_SECONDS
    while time.monotonic() < end:
        try:
            message = link.receive(1.0) or {}
        except OSError:
            raise MultihostError(
                f"the coordinator at {cluster.coordinator} ended before all {cluster.num_processes} processes had "
                "connected: check the output of process 0, then start all processes again"
            ) from None
        if "error" in message:
            raise MismatchError(message["error"])
        if "wait" in message:
            on_wait(f"waiting for {message['wait']} of {cluster.num_processes} processes")
        if "go" in message:
            on_wait("connecting the processes")
            machines = [(host, machine, address) for host, machine, address in message["go"]]
            return Runtime(cluster, link, machines, reports)
    raise MultihostError(f"the coordinator at {cluster.coordinator} does not answer: start all processes again")


def _versions() -> dict[str, str]:
    return {"grok1": VERSION, "JAX": importlib.metadata.version("jax"), "jaxlib": importlib.metadata.version("jaxlib")}


def _machine_id() -> str:
    """Return an identifier of this machine, or an empty string if the system has none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _start_coordinator(cluster: Cluster) -> None:
    """Start the coordinator's process, which ends by itself.

    Raises:
        MultihostError: if it cannot listen at its address.
    """
    host = cluster.bind_address
    arguments = (host, cluster.port, cluster.num_processes, cluster.timeout, SILENCE_SECONDS)
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        # With -P, files of the current directory cannot shadow Python's modules.
        [sys.executable, "-P", "-m", "grok1.multihost.coordinator", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,  # Ctrl-C on the terminal must not reach it
    )
    assert process.stdout is not None
    answer = process.stdout.readline().strip()
    if answer != "ready":
        raise MultihostError(
            f"the coordinator cannot listen at {host}, port {cluster.port} ({answer or 'it ended'}): choose a free "
            "port and an address of this host with --coordinator"
        )


def _reach_coordinator(cluster: Cluster) -> Link:
    """Connect to the coordinator, which may start later than this process.

    Raises:
        MultihostError: if it cannot be reached within the timeout.
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
                    f"cannot connect to process 0 at {cluster.coordinator} within {cluster.timeout} seconds "
                    f"({error.strerror or error}): check that it is running and that this host can reach its address"
                ) from None
            time.sleep(0.2)
