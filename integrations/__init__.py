"""Adapters to what shards or drives training: each module knows one host."""
