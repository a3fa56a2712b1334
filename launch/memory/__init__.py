"""Parts of memory_report.py: shapes of models, and bytes of optimizers."""
