import dataclasses
import os
import pty
import select
import signal
import subprocess
import sys

import pytest
from configs import TEXT

from grok1.checkpoint.writer import write_checkpoint
from grok1.text.train_tokenizer import train_small_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small model with a tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    write_checkpoint(folder, TEXT, tokenizer=train_small_tokenizer(TEXT.vocab_size))
    return folder


@pytest.fixture(scope="session")
def long_checkpoint(tmp_path_factory):
    """The same model with a long context."""
    folder = tmp_path_factory.mktemp("cli") / "long"
    config = dataclasses.replace(TEXT, sequence_len=2048)
    write_checkpoint(folder, config, tokenizer=train_small_tokenizer(TEXT.vocab_size))
    return folder


@pytest.fixture
def complete(grok1, checkpoint):
    """Run `grok1 run` with the small model on one device."""

    def run(*arguments, stdin=b"", mesh="1,1"):
        return grok1("run", "-c", checkpoint, "--mesh", mesh, *arguments, stdin=stdin)

    return run


@pytest.fixture
def start():
    """Start a command in a new process, which is killed when the test ends."""
    processes = []

    def start(*arguments, code=None, env=None, **options):
        command = ["-c", code] if code is not None else ["-m", "grok1"]
        # In a background job, a child process would inherit that SIGINT is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [sys.executable, *command, *map(str, arguments)],
            env=os.environ | (env or {}),
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def terminal():
    """A pseudo-terminal for child processes."""
    terminal = PseudoTerminal()
    yield terminal
    terminal.close()


class PseudoTerminal:
    """A pseudo-terminal; `there` is the end of the child process."""

    def __init__(self):
        self.here, self.there = pty.openpty()
        self._unread = b""

    def type(self, text):
        """Type text, fewer characters than the system buffers."""
        os.write(self.here, text.encode())

    def read_until(self, text):
        """Wait for a text and return the output up to its end; the rest is left for the next call."""
        seen, mark = self._unread, text.encode()
        while mark not in seen:
            ready, _, _ = select.select([self.here], [], [], 60)
            assert ready, f"expected {text!r}, read {seen!r}"
            seen += os.read(self.here, 4096)
        end = seen.index(mark) + len(mark)
        self._unread = seen[end:]
        return seen[:end].decode(errors="replace")

    def close(self):
        os.close(self.here)
        os.close(self.there)
