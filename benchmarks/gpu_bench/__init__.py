"""The parts of benchmarks/gpu.py: settings, models, rows, and what is made of their numbers."""
