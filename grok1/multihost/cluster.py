"""The processes of a run, as given by options or detected from a cluster's environment variables."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import socket
from collections.abc import Mapping

from grok1.errors import MultihostError
from grok1.multihost import jax_private

START_TIMEOUT = 300
"""Seconds that a process waits for the others by default."""

# Keys are JAX's names; Kubernetes has none.
_NAMES = {
    "slurm": "SLURM",
    "ompi": "Open MPI",
    "": "Kubernetes",
    "tpu": "Cloud TPU",
    "gcetpu": "Cloud TPU",
    "gketpu": "Cloud TPU",
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, and the index of this one.

    Attributes:
        coordinator: `HOST:PORT` of process 0.
        num_processes: number of processes.
        process_id: index of this process, from 0.
        bind: address that the coordinator listens on; None for the address of its host's name.
        timeout: seconds to wait for the others.
        local_devices: indices of this host's GPUs that this process uses; None for all.
        found_by: name of the detected kind of cluster; None if everything was given by options.
    """

    coordinator: str
    num_processes: int
    process_id: int
    bind: str | None = None
    timeout: int = START_TIMEOUT
    local_devices: tuple[int, ...] | None = None
    found_by: str | None = None

    @property
    def host(self) -> str:
        """The coordinator's host, without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The coordinator's port."""
        return int(self.coordinator.rpartition(":")[2])

    @property
    def bind_address(self) -> str:
        """The address that the coordinator listens on.

        By default it is the address of its host's name, so that a coordinator on the loopback address is not visible to
        other hosts. In a cluster, a host's own name may resolve to the loopback address; the coordinator then listens
        on all addresses.
        """
        if self.bind is not None:
            return self.bind
        address = _address(self.host, self.port)
        if self.found_by is not None and self.num_processes > 1 and ipaddress.ip_address(address).is_loopback:
            return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        return address


def given_cluster(
    coordinator: str | None, num_processes: int | None, process_id: int | None, bind: str | None, timeout: int
) -> Cluster:
    """Build a cluster from options.

    Args:
        coordinator: `HOST:PORT`, or `:PORT` for the loopback address.
        num_processes: number of processes.
        process_id: index of this process.
        bind: address that the coordinator listens on.
        timeout: seconds to wait for the others.

    Raises:
        MultihostError: if a value is missing or invalid.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        raise MultihostError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: give --coordinator, "
            "--num-processes and --process-id together, or --distributed in a cluster"
        )
    if not 0 <= process_id < num_processes:
        raise MultihostError(
            f"process id {process_id} is out of range: expected 0 to {num_processes - 1} for {num_processes} processes"
        )
    host, _, port = coordinator.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise MultihostError(f'invalid coordinator "{coordinator}": expected HOST:PORT, such as 10.0.0.1:8476')
    return Cluster(f"{host or '127.0.0.1'}:{port}", num_processes, process_id, bind, timeout)


def detected_cluster(
    coordinator: str | None, num_processes: int | None, process_id: int | None, bind: str | None, timeout: int
) -> Cluster:
    """Detect the cluster of this process with JAX: SLURM, Open MPI, Kubernetes or Cloud TPU.

    Args: as for `given_cluster`; a value that is not None overrides the detected one.

    Raises:
        MultihostError: if no cluster is detected, or it does not provide all values.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = jax_private.cluster_environment()
    if found is None:
        if None not in (coordinator, num_processes, process_id):
            return given_cluster(coordinator, num_processes, process_id, bind, timeout)
        raise MultihostError(
            "no cluster was detected (SLURM, Open MPI, Kubernetes or Cloud TPU): start grok1 with the cluster's "
            "launcher, such as srun or mpirun, or give --coordinator, --num-processes and --process-id"
        )
    name = _NAMES.get(found.name, found.__name__)
    try:
        address, count, index, local = jax_private.detect_process(coordinator, num_processes, process_id, timeout)
    except Exception as error:  # of any type, depending on the cluster
        raise MultihostError(
            f"{name} was detected, but its settings are incomplete ({error}): give --coordinator, --num-processes and "
            "--process-id"
        ) from None
    cluster = given_cluster(address, count, index, bind, timeout)
    devices = None if local is None or _alone_on_host(os.environ) else tuple(local)
    return dataclasses.replace(cluster, local_devices=devices, found_by=name)


def _alone_on_host(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started one process per host, which then uses all GPUs of the host.

    JAX would assign it only the first GPU.
    """
    of_open_mpi = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    of_slurm = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return of_open_mpi == "1" or re.fullmatch(r"1(\(x\d+\))?", of_slurm) is not None


def _address(host: str, port: int) -> str:
    """Resolve a host name.

    Raises:
        MultihostError: if it has no address.
    """
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise MultihostError(
            f'cannot resolve the coordinator\'s host "{host}" ({error.strerror}): give a name that every host can '
            "resolve, or an IP address"
        ) from None
