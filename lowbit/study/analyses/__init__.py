"""Analyses: what a study found beyond its table, each one function from a view of the study to panels of its report.

An analysis reads evidence and runs no model, so that it can be asked of any study that holds what it needs; a new one
is one file here and one line below. ``analyses = ["confidence"]`` in the study file names those that it shows.
"""

from __future__ import annotations

from collections.abc import Mapping

ANALYSES: Mapping[str, str] = {
    "sampling": "what models write over temperature, top-k and length",
    "confidence": "how sure answers are, and how right to be so",
    "disagreement": "which answers change, what foretells them, and what a cascade would cost",
    "laws": "the best precision for a budget of bytes, over a family of models",
    "scale": "a larger model in fewer bits, or a smaller one in more",
    "budgets": "the fewest bits for weights, activations and cache within a loss of 2, 5 and 10 %",
    "proxy": "how far perplexity foretells each task",
    "calibration": "what the calibration text changes, beside what its seed changes",
    "long_context": "what is found in long contexts, by length and depth",
    "outliers": "outliers of weights, inputs and cache, layer by layer",
    "cascades": "what a low-bit model keeps and costs, token by token, that asks the original where it is unsure",
    "where": "where the loss is: by layer, position and the original's own confidence",
}
"""Every analysis, with what it answers; each is the function ``panels`` of the module of its name."""
