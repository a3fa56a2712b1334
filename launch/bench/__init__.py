"""Parts of benchmark.py: optimizers, measurements, tables and pictures."""
