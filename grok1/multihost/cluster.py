"""Which processes make up a run: as the user says, or as a cluster's own variables do."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import socket
from collections.abc import Mapping

from grok1.errors import MultihostError

START_TIMEOUT = 300
"""Seconds that a process waits for the others, unless the user says otherwise."""

# By the names that JAX gives them; it has none for Kubernetes.
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
    """The processes of a run, and which of them this is.

    Attributes:
        coordinator: host and port at which process 0 can be reached.
        num_processes: how many there are.
        process_id: which is this one, counted from 0.
        bind: address that the coordinator listens on; None for the one of its host's name.
        timeout: seconds to wait for the others.
        local_devices: which of this host's GPUs this process has; None for all.
        found_by: the kind of cluster that was detected; None if the user has said it all.
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

        It is that of its host's name, so that a coordinator on the loopback address is seen by nobody else. A
        cluster's name for a host may stand for its loopback address on that host; then the coordinator listens on all.
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
    """The cluster that a user describes.

    Args:
        coordinator: `HOST:PORT`, or a port of the loopback address.
        num_processes: how many processes there are.
        process_id: which is this one.
        bind: address that the coordinator listens on.
        timeout: seconds to wait for the others.

    Raises:
        MultihostError: if something is missing or makes no sense.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        raise MultihostError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: --coordinator, --num-processes "
            "and --process-id go together, or --distributed finds them in a cluster"
        )
    if not 0 <= process_id < num_processes:
        raise MultihostError(f"process {process_id} is none of {num_processes}: expected 0 to {num_processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise MultihostError(f"the coordinator {coordinator!r} has no port: expected HOST:PORT, such as 10.0.0.1:8476")
    return Cluster(f"{host or '127.0.0.1'}:{port}", num_processes, process_id, bind, timeout)


def detected_cluster(
    coordinator: str | None, num_processes: int | None, process_id: int | None, bind: str | None, timeout: int
) -> Cluster:
    """The cluster that SLURM, Open MPI, Kubernetes or Cloud TPU have put this process in, as JAX detects it.

    Args:
        coordinator: as for `given_cluster`, as are the others; what is not None is taken as it is.
        num_processes: how many processes there are.
        process_id: which is this one.
        bind: address that the coordinator listens on.
        timeout: seconds to wait for the others.

    Raises:
        MultihostError: if there is no cluster that can be detected, or it does not say enough.
    """
    from jax._src.clusters import ClusterEnv

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    found = next((kind for kind in kinds if kind.is_env_present()), None)
    if found is None:
        if None not in (coordinator, num_processes, process_id):
            return given_cluster(coordinator, num_processes, process_id, bind, timeout)
        raise MultihostError(
            "no cluster was detected (of SLURM, Open MPI, Kubernetes and Cloud TPU): start grok1 with the cluster's "
            "own launcher, such as srun or mpirun, or say --coordinator, --num-processes and --process-id"
        )
    name = _NAMES.get(found.name, found.__name__)
    try:
        address, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, num_processes, process_id, None, None, timeout
        )
    except Exception as error:  # whatever a cluster's variables or services lead to
        raise MultihostError(
            f"{name} was detected, but it does not say who takes part ({error}): say --coordinator, --num-processes "
            "and --process-id"
        ) from None
    cluster = given_cluster(address, count, index, bind, timeout)
    devices = None if local is None or _alone_on_host(os.environ) else tuple(local)
    return dataclasses.replace(cluster, local_devices=devices, found_by=name)


def _alone_on_host(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has put only one process on each host, which then has all of the host's GPUs.

    JAX would give it the first, as if there were one process for each.
    """
    of_open_mpi = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    of_slurm = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return of_open_mpi == "1" or re.fullmatch(r"1(\(x\d+\))?", of_slurm) is not None


def _address(host: str, port: int) -> str:
    """The address of a host's name.

    Raises:
        MultihostError: if it has none.
    """
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise MultihostError(
            f"the coordinator's host {host!r} has no address ({error.strerror}): give one that every host knows, or "
            "its number"
        ) from None
