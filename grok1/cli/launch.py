"""`grok1 launch`: run a command as several processes on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from grok1.cli.terminal import Terminal, pass_terminal
from grok1.errors import MultihostError
from grok1.host.threads import THREADS_VARIABLE, num_threads

_COMMANDS = ("run", "batch", "score", "bench")
_GRACE_SECONDS = 10.0  # time for the other processes to end after process 0
_VIRTUAL_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_GPUS = Path("/proc/driver/nvidia/gpus")


@click.command(
    "launch",
    short_help="Run a command as several cooperating processes on this machine.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("-n", "--num-processes", type=click.IntRange(1), required=True, metavar="N", help="Number of processes.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    show_default="a free port",
    help="Port on the loopback address on which process 0 listens.",
)
@click.argument(
    "command_line",
    metavar="-- COMMAND [ARGUMENTS]...",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
    shell_complete=lambda ctx, param, incomplete: [name for name in _COMMANDS if name.startswith(incomplete)],
)
@pass_terminal
def command(terminal: Terminal, num_processes: int, port: int | None, command_line: tuple[str, ...]) -> None:
    """Run `grok1 COMMAND ARGUMENTS` as N cooperating processes on this machine, as on a cluster of several hosts.

    COMMAND is run, batch, score or bench. Process 0 reads the input and prints the results, and its exit status is that
    of launch.

    Each process gets an equal share of the CPU cores and of the NVIDIA GPUs, or of those in CUDA_VISIBLE_DEVICES if it
    is set. Without GPUs, the virtual CPU devices set by JAX_NUM_CPU_DEVICES or XLA_FLAGS are shared instead.

    \b
    Examples:
      grok1 launch -n 2 -- run -c bard "ROMEO."
      JAX_NUM_CPU_DEVICES=8 grok1 launch -n 2 -- bench --preset tiny --mesh 2,4
    """
    name, *arguments = command_line
    if name not in _COMMANDS:
        raise click.UsageError(f'"{name}" cannot be launched, expected one of {", ".join(_COMMANDS)}.')
    address = f"127.0.0.1:{port or _free_port()}"
    shares = _shares(os.environ, num_processes)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    processes: list[subprocess.Popen[bytes]] = []
    code = 1
    try:
        for process, share in enumerate(shares):
            place = ["--coordinator", address, "--num-processes", str(num_processes), "--process-id", str(process)]
            others = None if process == 0 else subprocess.DEVNULL
            silent = None if process == 0 or "--verbose" in arguments else subprocess.DEVNULL
            # -P: do not import modules from the current directory
            words = [sys.executable, "-P", "-m", "grok1", name, *place, *arguments]
            environment = {**os.environ, **share, "PYTHONPATH": path}
            processes.append(
                subprocess.Popen(
                    words, stdin=others, stdout=others, stderr=silent, env=environment, preexec_fn=_end_with_parent
                )
            )
        code = _wait(processes)
    finally:
        _end(processes)
    if code < 0 and -code not in (signal.SIGINT, signal.SIGTERM):
        terminal.error(f"process 0 was killed by signal {-code}: see the system log for the reason")
    raise click.exceptions.Exit(code if code >= 0 else 128 - code)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for process 0 and return its exit code; the terminal interrupts it, and SIGTERM is forwarded to it."""
    first = processes[0]

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            first.send_signal(number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, forward),
    }
    try:
        return first.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for all processes, and kill those that do not end."""
    end = time.monotonic() + _GRACE_SECONDS
    if processes and processes[0].poll() not in (None, 0):
        end = time.monotonic() + 2.0  # it may have failed before the others connected
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _shares(environment: Mapping[str, str], count: int) -> list[dict[str, str]]:
    """Return environment variables that give each process its devices and cores.

    Raises:
        MultihostError: if there are not enough devices.
    """
    threads = {THREADS_VARIABLE: str(max(1, num_threads() // count))}
    platforms = environment.get("JAX_PLATFORMS", "")
    gpus = [] if platforms == "cpu" else _gpus(environment)
    if gpus:
        if len(gpus) < count:
            raise MultihostError(
                f"found {len(gpus)} GPUs, expected at least one for each of {count} processes: lower -n"
            )
        size = len(gpus) // count
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * size : (i + 1) * size])} | threads for i in range(count)]
    if platforms != "cpu" and any(Path("/dev").glob("accel*")):
        raise MultihostError("all TPU chips of a host must be used by one process: run the command without launch")
    flags = environment.get("XLA_FLAGS", "")
    found = _VIRTUAL_DEVICES.search(flags)
    wanted = found[1] if found else environment.get("JAX_NUM_CPU_DEVICES", str(count))
    devices = int(wanted) if wanted.isascii() and wanted.isdigit() else 0
    if devices < count:
        raise MultihostError(
            f"found {wanted} virtual devices, expected at least one for each of {count} processes: set "
            f"JAX_NUM_CPU_DEVICES to {count} or more"
        )
    share = {"JAX_NUM_CPU_DEVICES": str(devices // count)}
    if found:
        share["XLA_FLAGS"] = _VIRTUAL_DEVICES.sub("", flags).strip()  # XLA interprets a blank as a file name
    return [share | threads for _ in range(count)]


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the visible NVIDIA GPUs as CUDA_VISIBLE_DEVICES names them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(i) for i in range(len(list(_GPUS.iterdir())))] if _GPUS.is_dir() else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Arrange for SIGTERM to be sent to this process when its parent dies; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
