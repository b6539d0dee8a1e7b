import pytest

from grok1.errors import MultihostError
from grok1.multihost import cluster
from grok1.multihost.cluster import Cluster, detected_cluster, given_cluster

SLURM = {
    "SLURM_JOB_ID": "4321",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}

MORE = ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "JAX_COORDINATOR_ADDRESS")


@pytest.fixture
def variables(monkeypatch):
    """Set variables of a cluster and remove those of others."""
    for name in (*SLURM, *OPEN_MPI, *MORE, "KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)

    def variables(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return variables


def test_a_port_without_host_is_on_the_loopback_address():
    found = given_cluster(":8476", 2, 1, None, 30)
    assert (found.coordinator, found.host, found.port, found.bind_address) == (
        "127.0.0.1:8476",
        "127.0.0.1",
        8476,
        "127.0.0.1",
    )


def test_the_coordinator_listens_at_its_host_or_at_bind():
    assert given_cluster("10.1.2.3:99", 2, 0, None, 30).bind_address == "10.1.2.3"
    assert given_cluster("10.1.2.3:99", 2, 0, "0.0.0.0", 30).bind_address == "0.0.0.0"
    assert given_cluster("[::1]:99", 2, 0, None, 30).bind_address == "::1"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("h:1", None, 0), "--num-processes is missing: "),
        ((None, 2, None), "--coordinator and --process-id are missing: "),
        (("h:1", 2, 2), "process id 2 is out of range: expected 0 to 1"),
        (("h", 2, 0), 'invalid coordinator "h": expected HOST:PORT'),
        (("h:0", 2, 0), 'invalid coordinator "h:0"'),
        (("h:65536", 2, 0), 'invalid coordinator "h:65536"'),
        (("h:\u0663", 2, 0), 'invalid coordinator "h:\u0663"'),
    ],
)
def test_invalid_options_are_refused(given, sentence):
    with pytest.raises(MultihostError) as error:
        given_cluster(*given, None, 30)
    assert str(error.value).startswith(sentence)


def test_an_unknown_host_is_refused():
    with pytest.raises(MultihostError, match=r'cannot resolve .* host "no\.such\.host\.invalid"'):
        _ = given_cluster("no.such.host.invalid:1", 2, 0, None, 30).bind_address


def test_slurm_is_detected(variables):
    variables(SLURM)
    found = detected_cluster(None, None, None, None, 30)
    port = 4321 % 4096 + 61440  # as JAX derives it from the job id
    assert found == Cluster(f"localhost:{port}", 4, 2, None, 30, (0,), "SLURM")
    assert found.bind_address in ("::", "0.0.0.0")  # localhost resolves to the loopback address


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, None),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, (0,)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3"}, (0,)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1,)),
    ],
)
def test_a_process_alone_on_its_host_uses_all_devices(variables, more, devices):
    variables(more)
    assert detected_cluster(None, None, None, None, 30).local_devices == devices


def test_open_mpi_is_detected(variables):
    variables(OPEN_MPI)
    found = detected_cluster(None, None, None, None, 30)
    assert (found.host, found.num_processes, found.process_id) == ("10.96.0.1", 2, 1)
    assert (found.local_devices, found.found_by, found.bind_address) == ((1,), "Open MPI", "10.96.0.1")


def test_options_override_detected_values(variables):
    variables(SLURM)
    found = detected_cluster("10.0.0.9:77", None, None, "0.0.0.0", 30)
    assert (found.coordinator, found.num_processes, found.bind_address) == ("10.0.0.9:77", 4, "0.0.0.0")


def test_without_a_cluster_all_options_are_needed(variables):
    with pytest.raises(MultihostError, match="no cluster was detected"):
        detected_cluster(None, 2, None, None, 30)
    assert detected_cluster("h:7", 2, 1, None, 30) == given_cluster("h:7", 2, 1, None, 30)


def test_incomplete_settings_of_a_cluster_are_reported(variables):
    variables(SLURM | {"SLURM_NTASKS": "many"})
    with pytest.raises(MultihostError, match="SLURM was detected, but its settings are incomplete"):
        detected_cluster(None, None, None, None, 30)


def test_kinds_of_clusters_have_the_names_that_jax_gives_them():
    from jax._src.clusters import ClusterEnv

    kinds = {kind.name for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method}
    assert kinds <= cluster._NAMES.keys()
