"""What GenARM decoding is compared with: a file each, plain, and all on the interface of `interface.py`.

`benchmarks/` must be on the path (a script in it has it there): `from baselines.best_of_n import best_of_n`.
"""
