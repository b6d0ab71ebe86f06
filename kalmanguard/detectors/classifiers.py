"""Two classifiers at run time, a few lines each: logistic regression and boosted trees, as trained by scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple, Protocol

from kalmanguard.errors import ConfigurationError


class Classifier(Protocol):
    """Log odds of an event, from features."""

    def log_odds(self, features: Sequence[float]) -> float:
        """``ln(p / (1 - p))`` for one row of finite features."""


class Node(NamedTuple):
    """A node of a tree: ``feature`` is -1 in a leaf; rows with ``x[feature] <= threshold`` go ``left``."""

    feature: int
    threshold: float
    left: int
    right: int
    value: float


class LogisticClassifier:
    """``intercept + sum_i coefficients_i x_i``, exactly rounded, so that every build computes the same number.

    Parameters
    ----------
    intercept
        Log odds of a row of zeros.
    coefficients
        One per feature, in the features' own units.

    Notes
    -----
    Equal to scikit-learn's ``LogisticRegression.predict_proba`` up to rounding (tested). Cost: one
    multiplication a feature, a few microseconds.

    Examples
    --------
    >>> LogisticClassifier(intercept=-1.0, coefficients=(2.0, 0.5)).log_odds((1.0, 2.0))
    2.0
    """

    def __init__(self, *, intercept: float, coefficients: Sequence[float]) -> None:
        self.intercept, self.coefficients = intercept, tuple(coefficients)

    def log_odds(self, features: Sequence[float]) -> float:
        """Log odds of one row, shape ``(F,)``."""
        return self.intercept + math.fsum(map(mul, self.coefficients, features))


class TreeClassifier:
    """Sum of the leaves that a row falls into, one per tree.

    Parameters
    ----------
    intercept
        Log odds before the first tree.
    trees
        Nodes per tree; the first is the root, and every node comes before its children.
    features
        Number of features.

    Raises
    ------
    ConfigurationError
        A node names a feature or a child that there is not, or a child that comes before it.

    Notes
    -----
    Equal to scikit-learn's ``HistGradientBoostingClassifier.predict_proba`` up to rounding (tested); features must not
    be nan. Cost: a comparison for each level of each tree.

    Examples
    --------
    >>> stump = (Node(0, 0.5, 1, 2, 0.0), Node(-1, 0.0, 0, 0, -2.0), Node(-1, 0.0, 0, 0, 2.0))
    >>> TreeClassifier(intercept=0.5, trees=(stump,), features=1).log_odds((1.0,))
    2.5
    """

    def __init__(self, *, intercept: float, trees: Sequence[Sequence[Node]], features: int) -> None:
        for number, tree in enumerate(trees):
            for index, node in enumerate(tree):
                # Children behind their parents: no walk can go in circles.
                inner = 0 <= node.feature < features and index < min(node.left, node.right)
                if not (node.feature == -1 or (inner and max(node.left, node.right) < len(tree))):
                    raise ConfigurationError(f"Node {index} of tree {number} is {tuple(node)}, which is no tree's.")
            if not tree:
                raise ConfigurationError(f"Tree {number} is empty.")
        self.intercept = intercept
        # Plain tuples, since named ones are slower to unpack.
        self.trees = tuple(tuple((n.feature, n.threshold, n.left, n.right, n.value) for n in tree) for tree in trees)

    def log_odds(self, features: Sequence[float]) -> float:
        """Log odds of one row, shape ``(F,)``."""
        leaves = []
        for tree in self.trees:
            feature, threshold, left, right, value = tree[0]
            while feature >= 0:
                feature, threshold, left, right, value = tree[left if features[feature] <= threshold else right]
            leaves.append(value)
        return self.intercept + math.fsum(leaves)


def probability(log_odds: float) -> float:
    """``1 / (1 + exp(-log_odds))`` without overflow."""
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1.0 + odds)
