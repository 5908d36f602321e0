"""`python -m greenvis` is `greenvis`."""

import sys

from greenvis.cli import main

sys.exit(main())
