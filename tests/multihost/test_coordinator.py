"""The coordinator, with clients written for these tests."""

import json
import socket
import subprocess
import sys

import pytest

from grok1.multihost import coordinator

PROGRAM = [sys.executable, "-m", "grok1.multihost.coordinator"]
HELLO = {"host": "here", "machine": "1", "versions": {"grok1": "1", "JAX": "2"}, "options": {"--mesh": [1, 2]}}


class Client:
    """A process of a run, from the point of view of the coordinator."""

    def __init__(self, port, process, processes=2, **hello):
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.lines = self.connection.makefile("rb")
        self.send(HELLO | {"process": process, "processes": processes} | hello)

    def send(self, message):
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, *names):
        """Return the next message that has one of these keys."""
        while line := self.lines.readline():
            message = json.loads(line)
            if message.keys() & set(names):
                return message
        raise EOFError

    def close(self):
        self.lines.close()
        self.connection.close()


@pytest.fixture
def start(port):
    """Start the coordinator, by default for two processes."""
    started = []

    def start(timeout=30.0, silence=30.0, count=2):
        words = [*PROGRAM, "127.0.0.1", port, count, timeout, silence]
        program = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)
        started.append(program)
        assert program.stdout.readline() == "ready\n"
        return program

    yield start
    for program in started:
        program.kill()
        program.communicate()


def test_it_starts_the_run_when_all_have_connected_and_ends_with_the_last(start, port):
    program = start()
    first = Client(port, 0)
    assert first.receive("wait") == {"wait": 1}
    second = Client(port, 1, host="there")
    for client in (first, second):
        assert client.receive("go") == {"go": [["here", "1", "127.0.0.1"], ["there", "1", "127.0.0.1"]]}
    second.send({"loading": [3, 7]})
    while first.receive("loading")["loading"] != [[0, 0], [3, 7]]:
        pass
    first.send({"end": 5})
    assert second.receive("end", "failed") == {"end": 5}
    second.close()
    first.close()
    assert program.wait(30) == 0


def test_a_lost_connection_is_reported_to_the_others(start, port):
    program = start()
    clients = [Client(port, process) for process in range(2)]
    for client in clients:
        client.receive("go")
    clients[1].close()
    assert clients[0].receive("failed", "end") == {"failed": [1, "ended unexpectedly"]}
    clients[0].close()
    assert program.wait(30) == 0


def test_a_silent_process_is_reported_as_failed(start, port):
    program = start(silence=1.5)
    clients = [Client(port, process) for process in range(2)]
    message = None
    while message is None or "failed" not in message:
        clients[0].send({"loading": [0, 0]})
        message = clients[0].receive("failed", "loading")
    assert message == {"failed": [1, "no answer for 2 seconds"]}
    for client in clients:
        client.close()
    assert program.wait(30) == 0


def test_only_the_first_failure_is_reported(start, port):
    start(count=3)
    clients = [Client(port, process, 3) for process in range(3)]
    clients[2].receive("go")
    clients[2].send({"failed": "its disk is full: make room"})
    assert clients[0].receive("failed", "end") == {"failed": [2, "its disk is full: make room"]}
    clients[2].close()
    clients[1].send({"end": 0})
    assert clients[0].receive("failed", "end") == {"end": 0}


def test_processes_that_do_not_connect_are_named(start, port):
    program = start(timeout=0.5, count=4)
    clients = [Client(port, process, 4) for process in (0, 2)]
    for client in clients:
        error = client.receive("error")["error"]
        assert error.startswith("processes 1, 3 of 4 did not connect within 0 seconds: start all")
        client.close()
    assert program.wait(30) == 0


def test_a_process_may_connect_again_before_the_start(start, port):
    start(count=3)
    first = Client(port, 0, 3)
    assert first.receive("wait") == {"wait": 2}
    gone = Client(port, 1, 3)
    assert first.receive("wait") == {"wait": 1}
    gone.close()
    assert first.receive("wait") == {"wait": 2}
    clients = [first, Client(port, 1, 3), Client(port, 2, 3)]
    assert all("go" in client.receive("go", "error") for client in clients)


def test_the_run_ends_if_process_0_leaves_before_the_start(start, port):
    program = start()
    second = Client(port, 1)
    second.receive("wait")
    Client(port, 0).connection.close()
    message = second.receive("go", "failed", "error")
    if "go" in message:  # process 0 left after all had connected
        message = second.receive("failed")
    assert message.get("failed", [0])[0] == 0
    second.close()
    assert program.wait(30) == 0


@pytest.mark.parametrize(
    ("hello", "sentence"),
    [
        (
            {"versions": {"grok1": "1", "JAX": "3"}},
            "JAX differs: '3' in process 1 (there), '2' in",
        ),
        ({"versions": {"grok1": "1"}}, "JAX differs: not given in process 1 (there), '2' in"),
        (
            {"options": {"--mesh": [2, 1]}},
            "--mesh differs: '2,1' in process 1 (there), '1,2' in process 0 (here)",
        ),
        (
            {"options": {"--mesh": [1, 2], "--seed": 4}},
            "--seed differs: '4' in process 1 (there), not given in",
        ),
        ({"options": {"--mesh": "x" * 99}}, "--mesh differs: '" + "x" * 37 + "...' in process 1"),
    ],
)
def test_differing_versions_and_options_are_refused(start, port, hello, sentence):
    start()
    clients = [Client(port, 0), Client(port, 1, host="there", **hello)]
    for client in clients:
        assert client.receive("go", "error")["error"].startswith(sentence)


@pytest.mark.parametrize(
    ("process", "processes", "sentence"),
    [
        (0, 2, "there was started as process 0 of 2, as here already was: give each process a different"),
        (5, 2, "there was started as process 5 of 2, expected an index from 0 to 1"),
        (
            1,
            3,
            "there was started as process 1 of 3, but process 0 expects 2 processes: start all with the same",
        ),
    ],
)
def test_a_surplus_process_is_refused_and_the_others_continue(start, port, process, processes, sentence):
    start()
    first = Client(port, 0)
    first.receive("wait")
    stranger = Client(port, process, processes, host="there")
    assert stranger.receive("error")["error"].startswith(sentence)
    stranger.close()
    second = Client(port, 1)
    assert "go" in second.receive("go", "error")
    assert "go" in first.receive("go", "error")


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"\n", b"[]\n", b'{"process": "x"}\n', b"\xff\xfe\n", b""]
)
def test_other_connections_are_ignored(start, port, noise):
    start()
    first = Client(port, 0)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(noise)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(100):
            pass
    second = Client(port, 1)
    assert "go" in second.receive("go", "error")
    assert "go" in first.receive("go", "error")


class Connection:
    """The addresses of a connection."""

    def __init__(self, peer, own):
        self.ends = {"peername": (peer, 1), "sockname": (own, 2)}

    def get_extra_info(self, name):
        return self.ends[name]


@pytest.mark.parametrize(
    ("peers", "addresses"),
    [
        (["127.0.0.1", "127.0.0.1"], ["127.0.0.1", "127.0.0.1"]),
        (["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"]),
        (["127.0.1.1", "10.0.0.2"], ["10.0.0.9", "10.0.0.2"]),  # a host's own name may resolve to its loopback address
        (["::ffff:127.0.0.1", "::ffff:10.0.0.2"], ["10.0.0.9", "10.0.0.2"]),
        (["::1", "fd00::2"], ["10.0.0.9", "fd00::2"]),
    ],
)
def test_addresses_at_which_others_reach_a_process(peers, addresses):
    meeting = coordinator.Coordinator(len(peers), 1, 1)
    meeting.writers = {i: Connection(peer, "10.0.0.9") for i, peer in enumerate(peers)}
    assert [meeting.address(i) for i in range(len(peers))] == addresses


def test_a_port_in_use_is_reported(port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        words = [*PROGRAM, "127.0.0.1", port, 2, 30, 30]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("ddress already in use\n") or "address already in use" in done.stdout
