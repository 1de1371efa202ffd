"""`python -m mpop`: the command of that name."""

import sys

from mpop.cli import main

sys.exit(main())
