"""The parts of train_vit.py: its options, data, models, optimizers, progress and reports."""
