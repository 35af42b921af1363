"""The parts of benchmarks/gpu.py: settings, models, rows, and the report of their numbers."""
