"""Two hosts, simulated by network namespaces with their own addresses and host names; needs root."""

import os
import shutil
import subprocess
import sys

import pytest

from grok1.checkpoint.writer import write_checkpoint
from grok1.config import PRESETS
from grok1.text.train_tokenizer import train_small_tokenizer

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 8476
TIMEOUT = 120


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot create network namespaces: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def hosts():
    """Names and links of two connected network namespaces."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("ip or unshare is not installed (Debian's iproute2 and util-linux)")
    if os.geteuid():
        pytest.skip("creating network namespaces needs root")
    names = [f"grok1-{os.getpid()}-{i}" for i in range(2)]
    links = [f"g{os.getpid()}v{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A copy of the same checkpoint for each host."""
    folders = [tmp_path_factory.mktemp("host") / "model" for _ in ADDRESSES]
    for folder in folders:
        write_checkpoint(folder, PRESETS["tiny"], seed=1)
    (folders[0] / "tokenizer.model").write_bytes(train_small_tokenizer(PRESETS["tiny"].vocab_size))
    return folders


@pytest.fixture
def start(hosts, checkpoints, environment):
    """Function that starts a command on both hosts, each with its own checkpoint."""
    started = []

    def start(name, *arguments):
        for process, (namespace, _) in enumerate(hosts):
            cluster = ["--coordinator", f"{ADDRESSES[0]}:{PORT}", "--num-processes", "2", "--process-id", str(process)]
            words = [sys.executable, "-m", "grok1", name, *cluster, "-c", str(checkpoints[process])]
            script = f'hostname host-{process}; exec "$@"'
            inside = ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", script, "sh"]
            started.append(
                subprocess.Popen(
                    [*inside, *words, *map(str, arguments)],
                    env=environment(2),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started[-2:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_model_that_fits_on_one_host_is_loaded_on_each(start):
    first, second = start("run", "The answer", "--greedy", "-n", 8, "--json")
    out, errors = first.communicate(timeout=TIMEOUT)
    assert (first.returncode, errors) == (0, "")
    assert '"mesh": [2, 2]' in out
    assert '"host": "host-0"' in out
    assert '"host": "host-1"' in out
    assert second.communicate(timeout=TIMEOUT) == ("", "")
    assert second.returncode == 0


def test_a_model_can_be_split_across_both_hosts(start, checkpoints, spawn):
    words = ("run", "The answer", "--greedy", "-n", 8)
    first, _ = start(*words, "--mesh", "1,4")
    alone = spawn("-m", "grok1", *words, "-c", checkpoints[0]).communicate(timeout=TIMEOUT)
    assert first.communicate(timeout=TIMEOUT) == alone


@pytest.mark.slow
def test_a_broken_link_ends_both_processes(start, hosts, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Prompt number {i}\n" for i in range(3000)))
    journal = tmp_path / "out.jsonl.journal"
    first, second = start("batch", prompts, "-o", tmp_path / "out.jsonl", "-n", 60, "--greedy", "--mesh", "1,4")
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert first.poll() is None, first.communicate()
        os.sched_yield()
    namespace, link = hosts[0]
    ip("-n", namespace, "link", "set", link, "down")
    try:
        errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    finally:
        ip("-n", namespace, "link", "set", link, "up")
    assert (first.returncode, second.returncode) == (1, 1)
    assert errors[0].startswith("grok1: error: process 1 (host-1): it has not answered for 20 seconds")
    assert errors[1].startswith(f"grok1: error: the coordinator of process 0, {ADDRESSES[0]}:{PORT}, cannot be reached")
    assert [error.count("\n") for error in errors] == [1, 1]
