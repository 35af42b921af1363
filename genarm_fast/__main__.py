"""`python -m genarm_fast` is `genarm-fast`."""

import sys

from genarm_fast.cli import main

sys.exit(main())
