"""Decoding: exact samplers over the pair, each fast loop beside its slow oracle."""

from dgd_lightning.decode.autoregressive import autoregressive_generate
from dgd_lightning.decode.engine import Progress
from dgd_lightning.decode.guided import guided_generate
from dgd_lightning.decode.speculative import Scheme, speculative_generate

__all__ = ["Progress", "Scheme", "autoregressive_generate", "guided_generate", "speculative_generate"]
