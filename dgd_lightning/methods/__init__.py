"""Ways to decode, one file each."""
