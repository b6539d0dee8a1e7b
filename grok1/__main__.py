"""Entry point of `grok1` and `python -m grok1`."""

import os
import signal
import sys


def main() -> int:
    """Run the command line and return its exit code; Ctrl-C during imports ends the process without a traceback."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # SIGINT is ignored in background jobs
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
