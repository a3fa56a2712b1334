"""What memory_report.py reports: models and optimizers, in bytes."""
