"""Lightning callbacks: what is logged and written."""

from dgd_lightning.callbacks.clbench_scorer import CLBenchScorer as CLBenchScorer
from dgd_lightning.callbacks.decode_metrics import AdaptMetrics as AdaptMetrics
from dgd_lightning.callbacks.decode_metrics import DecodeMetrics as DecodeMetrics
from dgd_lightning.callbacks.diagnostic_report import DiagnosticReport as DiagnosticReport
from dgd_lightning.callbacks.divergence import CaseStudies as CaseStudies
from dgd_lightning.callbacks.divergence import DivergenceMetrics as DivergenceMetrics
from dgd_lightning.callbacks.interrupted import FitInterrupted as FitInterrupted
from dgd_lightning.callbacks.power_metrics import PowerMetrics as PowerMetrics
from dgd_lightning.callbacks.progress import DecodeProgress as DecodeProgress
from dgd_lightning.callbacks.progress import FitProgress as FitProgress
from dgd_lightning.callbacks.provenance import Provenance as Provenance
from dgd_lightning.callbacks.rows import PredictionWriter as PredictionWriter
