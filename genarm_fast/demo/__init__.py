"""A real base model and real ARMs to try GenARM with; `python -m genarm_fast.demo` shows them at work."""

from genarm_fast.demo.assets import arm, arm_names, base

__all__ = ["arm", "arm_names", "base"]
