"""All uses of names that JAX and jaxlib do not document; `tests/multihost/test_jax_private.py` checks each of them.

`jax.distributed.initialize`, the public interface, runs the coordination service inside process 0. If that process
dies, the others abort with a C++ stack trace. grok1 runs the service in a process of its own
(`grok1.multihost.coordinator`), so it must do the steps of `initialize` itself.

Nothing is imported before a function is called: the coordinator's process needs only jaxlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def start_coordination_service(address: str, num_processes: int) -> Any:
    """Start JAX's coordination service at `HOST:PORT`; it stops when the returned object is deleted."""
    from jaxlib import _jax

    return _jax.get_distributed_runtime_service(address, num_processes)


def connect(coordinator: str, num_processes: int, process_id: int, timeout: int) -> Any:
    """Connect to the coordination service, as `jax.distributed.initialize` does.

    Args:
        coordinator: `HOST:PORT` of the service.
        num_processes: number of processes of the run.
        process_id: index of this process.
        timeout: seconds to wait for the service.

    Returns:
        the client, whose key-value store all processes share.
    """
    from jax._src import distributed
    from jaxlib import _jax

    client = _jax.get_distributed_runtime_client(
        coordinator, process_id, init_timeout=timeout, shutdown_on_destruction=False, use_compression=True
    )
    client.connect()
    state = distributed.global_state
    state.coordinator_address = coordinator
    state.num_processes = num_processes
    state.process_id = process_id
    state.client = client
    return client


def use_gloo(client: Any, address: str) -> None:
    """Make CPU devices communicate by Gloo, over TCP.

    Args:
        client: of the coordination service.
        address: of this host. By default Gloo uses the address of the host's name, which other hosts may not reach.
    """
    from jax._src import xla_bridge
    from jaxlib import _jax

    collectives = _jax.make_gloo_tcp_collectives(distributed_client=client, hostname=address)
    xla_bridge.register_backend_factory(
        "cpu", lambda: xla_bridge.make_cpu_client(collectives), priority=0, fail_quietly=False
    )


def cluster_environment() -> Any:
    """Return the first of JAX's cluster classes whose cluster this process runs in, or None."""
    from jax._src.clusters import ClusterEnv

    kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    return next((kind for kind in kinds if kind.is_env_present()), None)


def detect_process(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Complete the given values with those of the cluster that this process runs in.

    Returns:
        coordinator, number of processes, index of this process, indices of its devices on this host (None for all).

    Raises:
        Exception: of any type, if the cluster's variables or services do not provide a value.
    """
    from jax._src.clusters import ClusterEnv

    found: tuple[str | None, int | None, int | None, Sequence[int] | None]
    found = ClusterEnv.auto_detect_unset_distributed_params(coordinator, num_processes, process_id, None, None, timeout)
    return found
