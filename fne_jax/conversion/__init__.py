"""Checkpoints of others into runs of ours, and runs of ours into models for others."""
