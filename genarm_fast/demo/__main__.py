"""`python -m genarm_fast.demo`."""

import os

# Set before torch starts OpenMP: threads that wait then sleep instead of spinning. When other processes wanted the
# cores too, spinning made two threads on two cores 7 times slower (2.5 instead of 17.7 tokens per second).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from genarm_fast.demo.show import main

raise SystemExit(main())
