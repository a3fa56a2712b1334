"""The parts of train_vit.py: its options, data, models, optimizers, progress and reports."""

from sharded_shampoo4.integrations.quiet import quiet

quiet()
