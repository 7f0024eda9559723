"""Figures and pages from plain values: scores, images, training, how far scores can be trusted, runs side by side.

Knows no MLflow, torch or run.
"""

from ._canvas import figure_png_bytes
from ._compare import comparison_html, comparison_text
from ._compare_figure import comparison_figure
from ._compare_matrix import comparison_matrix_html, comparison_matrix_text
from ._curves import influence_over_training_figure, influence_share_over_training_figure, training_figure
from ._lds import counterfactual_figure, lds_by_drop_figure, lds_scatter_figure
from ._pictures import Picture, extremes_figure
from ._scores import score_histogram_figure
from ._text import markdown_text, plain_text

__all__ = [
    "Picture",
    "comparison_figure",
    "comparison_html",
    "comparison_matrix_html",
    "comparison_matrix_text",
    "comparison_text",
    "counterfactual_figure",
    "extremes_figure",
    "figure_png_bytes",
    "influence_over_training_figure",
    "influence_share_over_training_figure",
    "lds_by_drop_figure",
    "lds_scatter_figure",
    "markdown_text",
    "plain_text",
    "score_histogram_figure",
    "training_figure",
]
