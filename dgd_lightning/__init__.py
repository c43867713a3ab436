"""dgd-lightning: draft-guided decoding with test-time training."""
