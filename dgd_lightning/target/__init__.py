"""The frozen target: loading, chunked prefill, steps at absolute positions, tapped features."""
