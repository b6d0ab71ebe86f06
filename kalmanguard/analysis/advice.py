"""What to try, by the name of the detector that fired."""

from __future__ import annotations

from typing import Final

#: Sentences for people; HEURISTIC, every one of them.
ADVICE: Final = {
    "loss": "Training-loss spikes: look whether the same batches spike from another state too (hard data); if they do "
    "not, lower the learning rate or warm it up longer.",
    "gradient": "Gradient norms jump: clip them at a little above their usual size, lengthen the warm-up, or lower the "
    "learning rate; Adam's second beta of 0.95 instead of 0.999 forgets a spike sooner.",
    "gradient-gate": "Gradients that are not finite, or tenfold the largest, should be skipped, not applied.",
    "gain": "Updates change size for the same learning rate: look at the optimizer's second moment, and at epsilon.",
    "trajectory": "The updates break with their past: look for a change of data, schedule or optimizer.",
    "drift": "The training loss drifts upwards: a learning rate that still rises, labels that have changed, or a data "
    "source that got worse.",
    "learning-rate": "The learning rate is above all that was tried before: raise it more slowly.",
    "loss-finite": "Losses that are not finite: skip those steps; with float16 or bfloat16 look for overflow in logits "
    "and normalisation.",
    "probe-innovation": "The held-out loss has moved where its past did not point to.",
    "overfitting": "The held-out loss rises while the training loss falls: stop early, regularise, or get more data.",
    "envelope": "Progress was lost: restore a checkpoint from before, skip the batches since, and go on with a lower "
    "learning rate; a supervisor in the loop does that by itself.",
}  # fmt: skip
