"""Lightning callbacks: what is logged and written."""

from callbacks.adapt_metrics import AdaptMetrics
from callbacks.case_studies import CaseStudies
from callbacks.clbench_scorer import CLBenchScorer
from callbacks.decode_metrics import DecodeMetrics
from callbacks.diagnostic_report import DiagnosticReport
from callbacks.divergence import DivergenceMetrics
from callbacks.fit_progress import FitProgress
from callbacks.prediction_writer import PredictionWriter
from callbacks.progress import DecodeProgress
from callbacks.provenance import Provenance

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
