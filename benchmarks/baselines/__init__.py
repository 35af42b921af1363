"""Plain implementations of the methods that GenARM decoding is compared with.

Each method has a file of its own, and all of them use the interface of `interface.py`. `benchmarks/` must be on
`sys.path`, as it is for a script directly in it; the scripts of this folder need PYTHONPATH=benchmarks.
"""
