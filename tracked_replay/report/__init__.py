"""Figures and pages from plain values: scores, images, training, how far scores can be trusted, runs side by side.

Knows no MLflow, torch or run.
"""

from ._canvas import figure_png_bytes
from ._compare import comparison_headline, comparison_html, comparison_text
from ._compare_figure import comparison_figure
from ._compare_matrix import comparison_matrix_html, comparison_matrix_text
from ._curves import influence_over_training_figure, influence_share_over_training_figure, training_figure
from ._frames import FRAME_EXAMPLES, training_frame
from ._influence import (
    Agreement,
    ClassInfluence,
    Fact,
    InfluencePage,
    InfluenceTarget,
    InfluentialExample,
    Prediction,
    RetrainedTarget,
    Validation,
)
from ._influence_compare import (
    INFLUENCE_COMPARISON_TARGETS,
    influence_comparison_headline,
    influence_comparison_html,
    influence_comparison_text,
    influence_scatter_figure,
)
from ._influence_page import FEW_RETRAININGS, class_influence, influence_page
from ._lds import counterfactual_figure, lds_by_drop_figure, lds_scatter_figure
from ._pictures import Picture, extremes_figure
from ._scores import score_histogram_figure
from ._suspects import Suspect, suspects_figure
from ._text import markdown_text, plain_text
from ._thumbnails import png_bytes, shrunk

__all__ = [
    "FEW_RETRAININGS",
    "FRAME_EXAMPLES",
    "INFLUENCE_COMPARISON_TARGETS",
    "Agreement",
    "ClassInfluence",
    "Fact",
    "InfluencePage",
    "InfluenceTarget",
    "InfluentialExample",
    "Picture",
    "Prediction",
    "RetrainedTarget",
    "Suspect",
    "Validation",
    "class_influence",
    "comparison_figure",
    "comparison_headline",
    "comparison_html",
    "comparison_matrix_html",
    "comparison_matrix_text",
    "comparison_text",
    "counterfactual_figure",
    "extremes_figure",
    "figure_png_bytes",
    "influence_comparison_headline",
    "influence_comparison_html",
    "influence_comparison_text",
    "influence_over_training_figure",
    "influence_page",
    "influence_scatter_figure",
    "influence_share_over_training_figure",
    "lds_by_drop_figure",
    "lds_scatter_figure",
    "markdown_text",
    "plain_text",
    "png_bytes",
    "score_histogram_figure",
    "shrunk",
    "suspects_figure",
    "training_figure",
    "training_frame",
]
