"""The handwritten digits that come with scikit-learn, split once and for all."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

N_TRAIN = 1_097
N_PROBE = 350


class Digits(NamedTuple):
    """Standardised 8 x 8 images as rows of 64 and their labels 0 to 9, in three disjoint splits."""

    train_inputs: Tensor
    train_targets: Tensor
    probe_inputs: Tensor
    probe_targets: Tensor
    held_out_inputs: Tensor
    held_out_targets: Tensor


def load_digits() -> Digits:
    """Load 1,797 digits as 1,097 for training, 350 for the probe and 350 held out.

    The split is the same for every seed. Pixels are standardised by the training split's one mean and deviation.

    References
    ----------
    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998).
    """
    from sklearn import datasets  # half a second, and only the digit plants need it

    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(1998).permutation(len(labels))
    inputs = torch.from_numpy(pixels[order]).float()
    targets = torch.from_numpy(labels[order]).long()
    inputs = (inputs - inputs[:N_TRAIN].mean()) / inputs[:N_TRAIN].std()
    end = N_TRAIN + N_PROBE
    return Digits(
        inputs[:N_TRAIN], targets[:N_TRAIN], inputs[N_TRAIN:end], targets[N_TRAIN:end], inputs[end:], targets[end:]
    )


def as_images(rows: Tensor) -> Tensor:
    """View rows of 64 pixels ``(N, 64)`` as images ``(N, 1, 8, 8)``."""
    return rows.view(-1, 1, 8, 8)
