"""The fair comparison of compare.py: two tasks, and optimizers that each get their own best learning rate."""
