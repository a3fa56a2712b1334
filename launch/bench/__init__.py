"""Parts of benchmark.py: optimizers, measurements, tables and pictures."""

from sharded_shampoo4.integrations.quiet import quiet

quiet()
