"""Running a command as one of several processes: process 0 runs it, and the others execute its model steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from grok1.cli.loading import ModelChoice, import_jax, start_jax
from grok1.cli.terminal import Terminal

if TYPE_CHECKING:
    from grok1.multihost.cluster import Cluster
    from grok1.multihost.runtime import Runtime

# Parameters that may differ between processes.
_OWN = {
    *("checkpoint", "tokenizer", "threads", "load_memory", "quiet", "verbose"),
    *("distributed", "coordinator", "num_processes", "process_id", "coordinator_bind", "start_timeout"),
}
_ENVIRONMENT = ("GROK1_KERNELS", "JAX_PLATFORMS")  # variables that must be equal on all processes

_TERMINATION_SECONDS = 20.0


@contextlib.contextmanager
def joined(find_cluster: Callable[[], Cluster], choice: ModelChoice) -> Iterator[Runtime]:
    """Connect to the other processes; within this block, process 0 runs the command.

    The other processes do not enter the block: they execute the steps of process 0 and exit when it does.

    Args:
        find_cluster: returns the description of the processes.
        choice: the options that select the model, with the paths of this process.

    Raises:
        MultihostError: if the processes cannot connect or do not agree.
    """
    terminal = click.get_current_context().ensure_object(Terminal)
    _keep_results_apart()
    import_jax(terminal, choice.threads)
    with terminal.interruptible():
        runtime = _join(terminal, find_cluster)
        if runtime.leads:
            terminal.on_leave = lambda: runtime.leave(130, wait=False)
            runtime.start(terminal.abort)
    terminal.clear()
    if not runtime.leads:
        _follow(terminal, runtime, choice)
    try:
        yield runtime
    except KeyboardInterrupt:
        runtime.leave(130)
        raise
    except Exception as error:
        if _is_exchange(error):
            terminal.show_status("a collective operation failed; looking for the process that ended")
            runtime.await_cause()
        runtime.leave(0 if isinstance(error, BrokenPipeError) else 1)
        raise
    finally:
        terminal.on_leave = None
        runtime.leave()


def _join(terminal: Terminal, find_cluster: Callable[[], Cluster]) -> Runtime:
    from grok1.multihost.join import MismatchError, join

    cluster = find_cluster()
    if cluster.process_id != 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # process 0 handles interrupts for all
    try:
        return join(cluster, _options(), terminal.show_status, reports=terminal.shows)
    except MismatchError:
        if cluster.process_id != 0 and not terminal.shows:
            terminal.abort(None, 1)
        raise


def _options() -> dict[str, Any]:
    """Return what must be equal on all processes: the command, its options, and some variables."""
    context = click.get_current_context()
    settings: dict[str, Any] = {"the command": context.info_name}
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in _OWN and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            shown = (
                max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.human_readable_name
            )
            settings[shown] = context.params.get(name, "given")
    return settings | {f"${name}": os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def _follow(terminal: Terminal, runtime: Runtime, choice: ModelChoice) -> None:
    """Execute the steps of process 0 until it exits, then exit."""
    terminal.quiet = True
    _end_patiently(runtime)
    from grok1.model.worker import worker_loop

    try:
        runtime.start(terminal.abort)
        start_jax(terminal, choice.threads)
        worker_loop(runtime, choice.checkpoint, choice.load_memory, choice.threads)
    except Exception as error:
        if _is_exchange(error):
            runtime.await_cause()
        from grok1.cli import sentence_of

        runtime.fail(sentence_of(error))
        terminal.abort(None, 1)


def _end_patiently(runtime: Runtime) -> None:
    """Delay the exit on SIGTERM, which schedulers send to all processes, to give process 0 time to finish.

    A second SIGTERM ends this process immediately.
    """

    def end() -> None:
        runtime.fail("it was terminated")
        os._exit(128 + signal.SIGTERM)

    def asked(number: int, frame: object) -> None:
        if asking:
            end()
        asking.append(threading.Timer(_TERMINATION_SECONDS, end))
        asking[0].daemon = True
        asking[0].start()

    asking: list[threading.Timer] = []
    signal.signal(signal.SIGTERM, asked)


def _is_exchange(error: Exception) -> bool:
    """Return whether the end of another process may have caused an error."""
    text = str(error)
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" not in text


def _keep_results_apart() -> None:
    """Discard what libraries write to file descriptor 1, as JAX's CPU collectives do, but not results."""
    if sys.stdout is None:
        return
    with contextlib.suppress(OSError, ValueError):
        results = os.dup(1)
        sys.stdout.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        sys.stdout = os.fdopen(
            results, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, newline="\n", closefd=False
        )
