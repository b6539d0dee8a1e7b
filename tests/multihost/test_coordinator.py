"""The coordinator's program, with clients that speak its lines by themselves."""

import json
import socket
import subprocess
import sys

import pytest

from grok1.multihost import coordinator

HELLO = {"host": "here", "machine": "1", "versions": {"grok1": "1", "JAX": "2"}, "options": {"--mesh": [1, 2]}}


class Client:
    """One process of a run, as the coordinator sees it."""

    def __init__(self, port, process, processes=2, **hello):
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.lines = self.connection.makefile("rb")
        self.say(HELLO | {"process": process, "processes": processes} | hello)

    def say(self, told):
        self.connection.sendall(json.dumps(told).encode() + b"\n")

    def hear(self, *names):
        """The next line that has one of these names."""
        while line := self.lines.readline():
            told = json.loads(line)
            if told.keys() & set(names):
                return told
        raise EOFError

    def close(self):
        self.lines.close()
        self.connection.close()


@pytest.fixture
def start(port):
    """Starts the program, for two processes."""
    started = []

    def start(timeout=30.0, silence=30.0, count=2):
        words = [sys.executable, coordinator.__file__, "127.0.0.1", port, count, timeout, silence]
        program = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)
        started.append(program)
        assert program.stdout.readline() == "ready\n"
        return program

    yield start
    for program in started:
        program.kill()
        program.communicate()


def test_all_that_come_may_go_and_the_program_ends_with_the_last(start, port):
    program = start()
    first = Client(port, 0)
    assert first.hear("wait") == {"wait": 1}
    second = Client(port, 1, host="there")
    for client in (first, second):
        assert client.hear("go") == {"go": [["here", "1", "127.0.0.1"], ["there", "1", "127.0.0.1"]]}
    second.say({"loading": [3, 7]})
    while first.hear("loading")["loading"] != [[0, 0], [3, 7]]:
        pass
    first.say({"end": 5})
    assert second.hear("end", "failed") == {"end": 5}
    second.close()
    first.close()
    assert program.wait(30) == 0


def test_who_loses_its_connection_has_died_and_all_others_hear_of_it(start, port):
    program = start()
    clients = [Client(port, process) for process in range(2)]
    for client in clients:
        client.hear("go")
    clients[1].close()
    assert clients[0].hear("failed", "end") == {"failed": [1, "it ended unexpectedly"]}
    clients[0].close()
    assert program.wait(30) == 0


def test_who_says_nothing_any_more_has_died(start, port):
    program = start(silence=1.5)
    clients = [Client(port, process) for process in range(2)]
    told = None
    while told is None or "failed" not in told:
        clients[0].say({"loading": [0, 0]})
        told = clients[0].hear("failed", "loading")
    assert told == {"failed": [1, "it has not answered for 2 seconds"]}
    for client in clients:
        client.close()
    assert program.wait(30) == 0


def test_a_failure_is_told_to_all_and_only_the_first(start, port):
    start(count=3)
    clients = [Client(port, process, 3) for process in range(3)]
    clients[2].hear("go")
    clients[2].say({"failed": "its disk is full: make room"})
    assert clients[0].hear("failed", "end") == {"failed": [2, "its disk is full: make room"]}
    clients[2].close()
    clients[1].say({"end": 0})
    assert clients[0].hear("failed", "end") == {"end": 0}


def test_who_does_not_come_is_named(start, port):
    program = start(timeout=0.5, count=4)
    clients = [Client(port, process, 4) for process in (0, 2)]
    for client in clients:
        error = client.hear("error")["error"]
        assert error.startswith("processes 1, 3 have not come within 0 seconds, of 4 that were to")
        client.close()
    assert program.wait(30) == 0


def test_a_process_that_leaves_before_the_start_may_come_again(start, port):
    start(count=3)
    first = Client(port, 0, 3)
    assert first.hear("wait") == {"wait": 2}
    gone = Client(port, 1, 3)
    assert first.hear("wait") == {"wait": 1}
    gone.close()
    assert first.hear("wait") == {"wait": 2}
    clients = [first, Client(port, 1, 3), Client(port, 2, 3)]
    assert all("go" in client.hear("go", "error") for client in clients)


def test_process_0_leaving_early_ends_it_all(start, port):
    program = start()
    second = Client(port, 1)
    second.hear("wait")
    Client(port, 0).connection.close()
    told = second.hear("go", "failed", "error")
    if "go" in told:  # process 0 has left after all had come
        told = second.hear("failed")
    assert told.get("failed", [0])[0] == 0
    second.close()
    assert program.wait(30) == 0


@pytest.mark.parametrize(
    ("hello", "sentence"),
    [
        (
            {"versions": {"grok1": "1", "JAX": "3"}},
            "process 1 (there) has JAX '3' and process 0 (here) has '2': install",
        ),
        ({"versions": {"grok1": "1"}}, "process 1 (there) has JAX not at all and process 0 (here) has '2': install"),
        ({"options": {"--mesh": [2, 1]}}, "process 1 (there) has --mesh '2,1' and process 0 (here) has '1,2': start"),
        ({"options": {"--mesh": [1, 2], "--seed": 4}}, "process 1 (there) has --seed '4' and process 0 (here) has not"),
        ({"options": {"--mesh": "x" * 99}}, "process 1 (there) has --mesh '" + "x" * 37 + "...' and process 0"),
    ],
)
def test_what_is_not_the_same_everywhere_is_refused(start, port, hello, sentence):
    start()
    clients = [Client(port, 0), Client(port, 1, host="there", **hello)]
    for client in clients:
        assert client.hear("go", "error")["error"].startswith(sentence)


@pytest.mark.parametrize(
    ("process", "processes", "sentence"),
    [
        (0, 2, "there says that it is process 0 of 2, which here is already: give every process a --process-id"),
        (5, 2, "there says that it is process 5 of 2, which another is already"),
        (
            1,
            3,
            "there says that it is process 1 of 3, and process 0 that there are 2: start every process with the same",
        ),
    ],
)
def test_a_process_too_many_is_refused_and_the_others_go_on(start, port, process, processes, sentence):
    start()
    first = Client(port, 0)
    first.hear("wait")
    stranger = Client(port, process, processes, host="there")
    assert stranger.hear("error")["error"].startswith(sentence)
    stranger.close()
    second = Client(port, 1)
    assert "go" in second.hear("go", "error")
    assert "go" in first.hear("go", "error")


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"\n", b"[]\n", b'{"process": "x"}\n', b"\xff\xfe\n", b""]
)
def test_whoever_is_no_process_is_nobody(start, port, noise):
    start()
    first = Client(port, 0)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(noise)
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(100):
            pass
    second = Client(port, 1)
    assert "go" in second.hear("go", "error")
    assert "go" in first.hear("go", "error")


class Connection:
    """What a coordinator knows of a connection."""

    def __init__(self, peer, own):
        self.ends = {"peername": (peer, 1), "sockname": (own, 2)}

    def get_extra_info(self, name):
        return self.ends[name]


@pytest.mark.parametrize(
    ("peers", "addresses"),
    [
        (["127.0.0.1", "127.0.0.1"], ["127.0.0.1", "127.0.0.1"]),
        (["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"]),
        (["127.0.1.1", "10.0.0.2"], ["10.0.0.9", "10.0.0.2"]),  # a host's own name may be its loopback address
        (["::ffff:127.0.0.1", "::ffff:10.0.0.2"], ["10.0.0.9", "10.0.0.2"]),
        (["::1", "fd00::2"], ["10.0.0.9", "fd00::2"]),
    ],
)
def test_processes_are_told_at_which_address_others_reach_them(peers, addresses):
    meeting = coordinator.Coordinator(len(peers), 1, 1)
    meeting.writers = {i: Connection(peer, "10.0.0.9") for i, peer in enumerate(peers)}
    assert [meeting.address(i) for i in range(len(peers))] == addresses


def test_a_port_that_is_taken_is_said(port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        words = [sys.executable, coordinator.__file__, "127.0.0.1", port, 2, 30, 30]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("ddress already in use\n") or "address already in use" in done.stdout
