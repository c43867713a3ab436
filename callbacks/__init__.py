"""Lightning callbacks: what is logged and written."""

from dgd_lightning.callbacks.adapt_metrics import AdaptMetrics
from dgd_lightning.callbacks.case_studies import CaseStudies
from dgd_lightning.callbacks.clbench_scorer import CLBenchScorer
from dgd_lightning.callbacks.decode_metrics import DecodeMetrics
from dgd_lightning.callbacks.diagnostic_report import DiagnosticReport
from dgd_lightning.callbacks.divergence import DivergenceMetrics
from dgd_lightning.callbacks.fit_progress import FitProgress
from dgd_lightning.callbacks.prediction_writer import PredictionWriter
from dgd_lightning.callbacks.progress import DecodeProgress
from dgd_lightning.callbacks.provenance import Provenance

__all__ = [
    "AdaptMetrics",
    "CLBenchScorer",
    "CaseStudies",
    "DecodeMetrics",
    "DecodeProgress",
    "DiagnosticReport",
    "DivergenceMetrics",
    "FitProgress",
    "PredictionWriter",
    "Provenance",
]
