"""Communication between processes, with an in-memory store."""

import threading

import pytest

from grok1.multihost import jax_private
from grok1.multihost.cluster import given_cluster
from grok1.multihost.runtime import Runtime


class Store:
    """In-memory replacement for the key-value store of JAX's coordination service."""

    def __init__(self):
        self.values = {}
        self.changed = threading.Condition()

    def key_value_set_bytes(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get_bytes(self, key, timeout_in_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: no such key")
            return self.values[key]

    def key_value_delete(self, directory):
        with self.changed:
            for key in [key for key in self.values if key.startswith(directory)]:
                del self.values[key]


class SilentLink:
    """A connection to a coordinator that sends nothing."""

    def send(self, message):
        pass

    def receive(self, timeout):
        threading.Event().wait(timeout)


@pytest.fixture
def store(monkeypatch):
    """The store to which processes connect when they start."""
    store = Store()
    monkeypatch.setattr(jax_private, "connect", lambda *_: store)
    monkeypatch.setattr(jax_private, "use_gloo", lambda *_: None)
    return store


@pytest.fixture
def processes(store):
    """Three processes, connected to one store."""
    machines = [("a", "1", "10.0.0.1"), ("b", "2", "10.0.0.2"), ("a", "1", "10.0.0.1")]
    found = [Runtime(given_cluster(":1", 3, process, None, 1), SilentLink(), machines, False) for process in range(3)]
    for runtime in found:
        runtime.start(lambda sentence, code: None)
    return found


def in_threads(works):
    results = [None] * len(works)

    def run(index):
        results[index] = works[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_processes_know_their_hosts(processes):
    assert processes[1].host_of == [0, 1, 0]
    assert processes[1].name_of(1) == "process 1 (b)"
    assert [runtime.leads for runtime in processes] == [True, False, False]


def test_exchange_gives_every_process_the_values_of_all(processes):
    for number in range(2):
        works = [lambda r=runtime, i=i, n=number: r.exchange("x", [i, n]) for i, runtime in enumerate(processes)]
        assert in_threads(works) == [[[0, number], [1, number], [2, number]]] * 3


def test_messages_arrive_in_order_and_are_deleted(processes, store):
    count = 2600

    def send():
        for i in range(count):
            processes[0].send(str(i).encode())
            kept.append(len(store.values))

    kept = []
    receive = [lambda r=runtime: [int(r.receive()) for _ in range(count)] for runtime in processes[1:]]
    results = in_threads([send, *receive])
    assert results[1] == results[2] == list(range(count))
    assert max(kept) < 1100


def test_the_slowest_process_has_loaded_the_smallest_fraction(processes):
    processes[0].report_loading(50, 100)
    processes[0].loading = [(0, 0), (0, 0), (0, 0)]
    assert processes[0].slowest() == (0, 50, 100)
    processes[0].loading = [(0, 0), (900, 1000), (4, 10)]
    assert processes[0].slowest() == (2, 4, 10)
