"""A real base model and real ARMs to try GenARM with, and `python -m genarm_fast.demo` to watch them."""

from genarm_fast.demo.assets import arm, arm_names, base

__all__ = ["arm", "arm_names", "base"]
