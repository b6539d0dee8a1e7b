import os
import signal
import stat

READY = "\x1b[?2004h"  # sent by prompt_toolkit before it shows the prompt


def test_interactive_session(start, long_checkpoint, terminal, tmp_path):
    """A session with an invalid prompt, an interrupt and a completion."""
    process = start(
        *("run", "-c", long_checkpoint, "--mesh", "1,1", "-n", 20, "--seed", 3),
        env={"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        stdin=terminal.there,
        stdout=terminal.there,
        stderr=terminal.there,
    )
    terminal.read_until(READY)

    terminal.type("0 " * 1100 + "\r")  # an invalid prompt does not end the session
    terminal.read_until("expected at most 2047 (the model's context is 2048)")
    terminal.read_until(READY)

    terminal.type("hello\r")
    terminal.read_until("processing the prompt")
    process.send_signal(signal.SIGINT)
    terminal.read_until("[stopped]")
    terminal.read_until(READY)

    terminal.type("again\r")
    terminal.read_until("seed 3]")
    terminal.read_until(READY)

    terminal.type("\x04")  # Ctrl-D
    assert process.wait(timeout=60) == 0

    history = tmp_path / "grok1" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+hello\n" in history.read_text()


def test_interrupt_at_the_prompt_does_not_end_the_session(start, checkpoint, terminal, tmp_path):
    (tmp_path / "grok1").write_text("a file in place of the folder of the history")
    process = start(
        *("run", "-c", checkpoint, "--mesh", "1,1", "--json", "-n", 2),
        env={"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        stdin=terminal.there,
        stderr=terminal.there,
    )
    terminal.read_until(READY)
    terminal.type("hello\r")  # completed even though it cannot be saved
    assert b'"prompt": "hello"' in process.stdout.readline()
    terminal.read_until(READY)
    terminal.type("\x03")
    terminal.read_until("Press Ctrl-D to end the session.")
    terminal.read_until(READY)
    terminal.type("discarded\x03")
    terminal.read_until(READY)
    terminal.type("again\r")
    assert b'"prompt": "again"' in process.stdout.readline()
    terminal.read_until(READY)
    terminal.type("\x04")
    assert process.wait(timeout=60) == 0


def test_session_with_several_processes(start, long_checkpoint, terminal, tmp_path):
    process = start(
        *(
            "launch",
            "-n",
            2,
            "--",
            "run",
            "-c",
            long_checkpoint,
            "--mesh",
            "1,2",
            "-n",
            40,
            "--seed",
            3,
            "--ignore-eos",
        ),
        env={
            "XDG_STATE_HOME": str(tmp_path),
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=16", "device_count=2"),
        },
        stdin=terminal.there,
        stdout=terminal.there,
        stderr=terminal.there,
    )
    terminal.read_until(READY)
    terminal.type("0 " * 1100 + "\r")
    terminal.read_until("expected at most 2047 (the model's context is 2048)")
    terminal.read_until(READY)
    terminal.type("again\r")
    terminal.read_until("seed 3]")
    terminal.read_until(READY)
    terminal.type("and again\r")
    terminal.read_until("seed 3]")
    terminal.read_until(READY)
    terminal.type("\x04")  # Ctrl-D
    assert process.wait(timeout=60) == 0
