"""Seeds made of several numbers."""

import hashlib


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed of several numbers, so that (seed 1, epoch 2) and (seed 2, epoch 1) have nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1
