"""Entry point of `python -m genarm_fast`, the same command as `genarm-fast`."""

import sys

from genarm_fast.cli import main

sys.exit(main())
