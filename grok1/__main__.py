"""`python -m grok1` is `grok1`."""

import sys

from grok1.cli import main

sys.exit(main())
