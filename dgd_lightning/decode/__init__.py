"""Decoding: exact samplers over the pair, each fast loop beside its slow oracle."""
