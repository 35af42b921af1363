"""Plain implementations of the methods that GenARM decoding is compared with.

Each method has a file of its own, and all of them use the interface of `interface.py`. `benchmarks/` must be on
`sys.path`, as it is for a script in that folder: `from baselines.best_of_n import best_of_n`.
"""
