"""The program `grok1`, also `python -m grok1`."""

import os
import signal
import sys


def main() -> int:
    """Runs the command line and returns its exit code; Ctrl-C while it is imported ends the process quietly."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it is ignored in background jobs
    if handled:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from grok1 import cli

    try:
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return cli.main()
    except KeyboardInterrupt:
        return cli.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
