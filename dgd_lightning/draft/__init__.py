"""The DFlash draft: configuration, network, attention masks, checkpoints, training objective."""
