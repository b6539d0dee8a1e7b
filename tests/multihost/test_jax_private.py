"""The undocumented names of JAX and jaxlib that grok1 uses exist in the installed version and behave as expected."""

import inspect
import re
from pathlib import Path

import pytest

from grok1.multihost import jax_private


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("jaxlib._jax", "get_distributed_runtime_service"),
        ("jaxlib._jax", "get_distributed_runtime_client"),
        ("jaxlib._jax", "make_gloo_tcp_collectives"),
        ("jax._src.distributed", "global_state"),
        ("jax._src.xla_bridge", "register_backend_factory"),
        ("jax._src.xla_bridge", "make_cpu_client"),
        ("jax._src.clusters", "ClusterEnv"),
    ],
)
def test_the_name_exists(module, name):
    assert hasattr(__import__(module, fromlist=[name]), name), f"this version of JAX has no {module}.{name}"


@pytest.mark.parametrize("name", ["coordinator_address", "num_processes", "process_id", "client"])
def test_the_global_state_has_the_attributes_that_are_set(name):
    from jax._src import distributed

    assert hasattr(distributed.global_state, name)


def test_clusters_are_detected_by_these_members():
    from jax._src.clusters import ClusterEnv

    assert {kind.__name__ for kind in ClusterEnv._cluster_types} >= {"SlurmCluster", "OmpiCluster", "K8sCluster"}
    assert all(hasattr(kind, "opt_in_only_method") for kind in ClusterEnv._cluster_types)
    parameters = list(inspect.signature(ClusterEnv.auto_detect_unset_distributed_params).parameters)
    assert parameters[:3] == ["coordinator_address", "num_processes", "process_id"]


def test_a_client_stores_and_reads_values_of_the_service(port):
    from jax._src import distributed

    state = distributed.global_state
    before = (state.coordinator_address, state.num_processes, state.process_id, state.client)
    service = jax_private.start_coordination_service(f"127.0.0.1:{port}", 1)
    try:
        client = jax_private.connect(f"127.0.0.1:{port}", 1, 0, timeout=10)
        client.key_value_set_bytes("a/b", b"\x00c")
        assert client.blocking_key_value_get_bytes("a/b", 1000) == b"\x00c"
        client.key_value_delete("a/")
        with pytest.raises(Exception, match=r"^DEADLINE_EXCEEDED"):
            client.blocking_key_value_get_bytes("a/b", 10)
        client.shutdown()
    finally:
        (state.coordinator_address, state.num_processes, state.process_id, state.client) = before
        del service


def test_no_other_file_uses_undocumented_names():
    folder = Path(jax_private.__file__).parents[1]
    pattern = re.compile(r"\bjax\._(?!_)|\bjaxlib\._|from jaxlib import|import jaxlib")
    found = {path.name for path in folder.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))}
    assert found == {"jax_private.py"}
