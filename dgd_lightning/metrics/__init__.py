"""Metrics: pure functions of what decoding gives, and thin torchmetrics wrappers."""
