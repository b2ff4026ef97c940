"""Log-perplexity: the mean negative log-likelihood of the text, and its paired difference.

Perplexity is ``exp`` of the log; the log is what has a mean, a standard error and a difference.
"""

from __future__ import annotations

import numpy as np

from lowbit.evaluation.metrics.base import Metric, Tokens
from lowbit.evaluation.statistics import Interval, paired_mean

LOG_PERPLEXITY = Metric("log_perplexity", "nat", "lower", "mean -log p of the text's tokens")
DELTA_LOG_PERPLEXITY = Metric(
    "delta_log_perplexity", "nat", "lower", "log-perplexity of the candidate less that of the reference, paired"
)


def log_perplexity(tokens: Tokens, level: float = 0.95) -> Interval:
    """Of the candidate alone, in nats a token. Never compare two of these intervals: use ``delta``."""
    return paired_mean(tokens.nll.astype(np.float64), tokens.cluster, level)


def log_perplexity_ref(tokens: Tokens, level: float = 0.95) -> Interval:
    """Of the reference alone, in nats a token."""
    return paired_mean(tokens.nll_ref.astype(np.float64), tokens.cluster, level)


def delta(tokens: Tokens, level: float = 0.95) -> Interval:
    """Mean of nll - nll_ref in nats, paired by token and clustered; positive is worse.

    ``exp(delta)`` is the ratio of the two perplexities.
    """
    return paired_mean(tokens.nll.astype(np.float64) - tokens.nll_ref, tokens.cluster, level)
