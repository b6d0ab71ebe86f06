"""The published experiment: a small character transformer that learns a repeated phrase."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kalmanguard.models import Plant
from kalmanguard.models.chartransformer import CharTransformer
from kalmanguard.models.plant import initialised_with
from kalmanguard.models.stream import WindowStream, in_batches, seeded

STEPS = 250
FAULT = "gradient_scale:300@120:steps=10"
WINDOW = (120, 130)
_PHRASE = "the quick brown fox jumps over the lazy dog. "
_REPEATS, _CONTEXT, _BATCH, _LR = 400, 64, 64, 5e-4
_PROBE, _HELD_OUT = 384, 128


class RepeatedPhrase(Plant):
    """Two layers of width 64, AdamW at 5e-4, batches of 64 windows of 64 characters of one phrase again and again.

    From the source: character transformer, repeated phrase, AdamW 5e-4, batch 64, length 64. Ours: the phrase, the
    size of the network (its source states none), and that probe and held-out windows are other places of that text.

    References
    ----------
    Or, arXiv:2601.17483, section on experiments.
    """

    def __init__(self, *, seed: int, steps: int) -> None:
        text = _PHRASE * _REPEATS
        letters = sorted(set(text))
        tokens = torch.tensor([letters.index(letter) for letter in text], dtype=torch.uint8)
        with initialised_with(seed):
            model = CharTransformer(vocabulary=len(letters), context=_CONTEXT, width=64, layers=2, heads=4)
        device = torch.device("cpu")

        def windows(count: int, key: int) -> list[tuple[Tensor, Tensor]]:
            starts = torch.randint(len(tokens) - _CONTEXT, (count, 1), generator=seeded(seed, key))
            drawn = tokens[starts + torch.arange(_CONTEXT + 1)].long()
            return in_batches(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), batch_size=64, device=device)

        super().__init__(
            name="repeated phrase",
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=_LR),
            scheduler=None,
            loader=WindowStream(tokens, context=_CONTEXT, seed=seed, batch_size=_BATCH, device=device),
            probe_loader=windows(_PROBE, 1),
            held_out=windows(_HELD_OUT, 2),
        )

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output.flatten(0, 1), target.flatten())
