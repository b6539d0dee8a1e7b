"""Fixtures that start several processes."""

import os
import signal
import socket
import subprocess
import sys

import pytest


@pytest.fixture
def port():
    """An unused port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment(monkeypatch):
    """Function that returns environment variables for a process with the given number of CPU devices."""

    def environment(devices=1):
        flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=16", "").strip()
        return {**os.environ, "XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": "1"}

    return environment


@pytest.fixture
def spawn(environment):
    """Function that starts Python with arguments. Teardown kills running processes and their children."""
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
    """Function that starts a grok1 command as several processes without `launch`, and returns them in order."""

    def together(count, *arguments, devices=1, own=lambda process: (), **options):
        name, *rest = arguments
        cluster = ("--coordinator", f":{port}", "--num-processes", count)
        return [
            spawn("-m", "grok1", name, *cluster, "--process-id", i, *rest, *own(i), devices=devices, **options)
            for i in range(count)
        ]

    return together
