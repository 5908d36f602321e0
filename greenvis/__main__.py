"""`python -m greenvis` is `greenvis`."""

import sys

from greenvis.cli.main import main

sys.exit(main())
