"""What all ways to decode share: calls and requests, sessions on caches, batches, sampling, verification, readouts."""
