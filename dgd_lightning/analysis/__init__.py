"""From finished rows to numbers: no Trainer, no model."""
