"""How good and how robust relevance maps are: metrics, perturbations, the benchmark and its report."""

from arrcoc.evaluation.benchmark import CONDITIONS, METHODS, evaluate
from arrcoc.evaluation.metrics import (
    auroc,
    average_precision,
    bootstrap_interval,
    expected_calibration_error,
    paired_difference,
    pointing_hit,
    recall_at_budget,
    token_labels,
    top_k_overlap,
)
from arrcoc.evaluation.orientation import (
    OrientationEstimate,
    OrientationWarning,
    check_orientation,
    estimate_orientation,
)
from arrcoc.evaluation.perturbations import (
    CORRUPTIONS,
    SEVERITIES,
    blur,
    brightness,
    contrast,
    gaussian_noise,
    jpeg,
    token_noise,
)
from arrcoc.evaluation.report import format_table, plot, save_report
from arrcoc.evaluation.results import BenchmarkReport, MethodScores

__all__ = [  # noqa: RUF022 - in the order of the imports above
    # running it
    "evaluate",
    "BenchmarkReport",
    "MethodScores",
    "CONDITIONS",
    "METHODS",
    # reading it
    "format_table",
    "plot",
    "save_report",
    # the sign of a backbone
    "estimate_orientation",
    "check_orientation",
    "OrientationEstimate",
    "OrientationWarning",
    # metrics
    "token_labels",
    "average_precision",
    "auroc",
    "pointing_hit",
    "recall_at_budget",
    "top_k_overlap",
    "paired_difference",
    "expected_calibration_error",
    "bootstrap_interval",
    # perturbations
    "SEVERITIES",
    "CORRUPTIONS",
    "token_noise",
    "gaussian_noise",
    "blur",
    "jpeg",
    "brightness",
    "contrast",
]
