import os
import signal
import socket
import subprocess
import sys

import pytest


@pytest.fixture
def port():
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment(monkeypatch):
    """What gives a process so many devices of the processor."""

    def environment(devices=1):
        flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=16", "").strip()
        return {**os.environ, "XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": "1"}

    return environment


@pytest.fixture
def spawn(environment):
    """Starts Python with arguments; whatever still runs at the end is killed, with all that it has started."""
    started = []

    def spawn(*arguments, devices=1, **options):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment(devices) | options.pop("env", {}),
            stdin=options.pop("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        started.append(process)
        return process

    yield spawn
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def together(spawn, port):
    """Starts a command of grok1 as several processes, by hand; gives them in order."""

    def together(count, *arguments, devices=1, own=lambda process: (), **options):
        name, *rest = arguments
        place = ("--coordinator", f":{port}", "--num-processes", count)
        return [
            spawn("-m", "grok1", name, *place, "--process-id", i, *rest, *own(i), devices=devices, **options)
            for i in range(count)
        ]

    return together
