"""Plans as integers: blocks, schedules, owners; the same on every rank."""
