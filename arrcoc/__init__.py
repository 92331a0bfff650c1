"""arrcoc: which CLIP visual tokens matter for a text query, robustly and within a budget."""

# isort: skip_file
# Use
from arrcoc.scorer import RelevanceResult, RelevanceScorer, load_scorer

# Parts
from arrcoc.backbones import load_backbone
from arrcoc.backbones.base import Backbone
from arrcoc.tokens import VisualTokens

# Model
from arrcoc.config import HeadConfig, TrainConfig
from arrcoc.training.run_config import RunConfig
from arrcoc.model.allocation import Allocation, PrecisionAwareAllocation
from arrcoc.model.head import RelevanceHead
from arrcoc.model.multiscale import FlatnessAwareMultiScale
from arrcoc.model.relevance import RelevanceModel
from arrcoc.model.robustness import RelevanceRobustness

# Training
from arrcoc.training.tokens import TokenLoader, encode_samples
from arrcoc.training.trainer import train_relevance_model_with_sam
from arrcoc.training.run import run_training

__version__ = "0.2.0"

__all__ = [
    "Allocation",
    "Backbone",
    "FlatnessAwareMultiScale",
    "HeadConfig",
    "PrecisionAwareAllocation",
    "RelevanceHead",
    "RelevanceModel",
    "RelevanceResult",
    "RelevanceRobustness",
    "RelevanceScorer",
    "RunConfig",
    "TokenLoader",
    "TrainConfig",
    "VisualTokens",
    "encode_samples",
    "load_backbone",
    "load_scorer",
    "run_training",
    "train_relevance_model_with_sam",
]
