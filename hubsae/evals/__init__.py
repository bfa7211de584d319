"""Metrics said exactly: reconstruction, splice, drift. Each number has one name, a scope and a token count.

>>> import torch
>>> from hubsae import evals
>>> from hubsae import HubSAE, SAEConfig
>>> sae = HubSAE.random(SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2))
>>> result = evals.reconstruction({"mine": sae}, torch.randn(50, 4))
>>> result["mine"].get("fvu").n_tokens
50
"""

from hubsae.evals.chains import Link
from hubsae.evals.comparison import Comparison, compare
from hubsae.evals.definitions import DEFINITIONS, Measure, to_metrics
from hubsae.evals.drift import DriftReport, drift
from hubsae.evals.probes import Probe
from hubsae.evals.reconstruction import reconstruction
from hubsae.evals.report import write_report
from hubsae.evals.results import ReconstructionResult, SAEReconstruction
from hubsae.evals.ridge import RidgeSums
from hubsae.evals.splice import SpliceResult, splice, splice_many

__all__ = [
    "DEFINITIONS",
    "Comparison",
    "DriftReport",
    "Link",
    "Measure",
    "Probe",
    "ReconstructionResult",
    "RidgeSums",
    "SAEReconstruction",
    "SpliceResult",
    "compare",
    "drift",
    "reconstruction",
    "splice",
    "splice_many",
    "to_metrics",
    "write_report",
]
