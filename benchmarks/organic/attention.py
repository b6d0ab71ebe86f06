"""A transformer at too high a learning rate, without warm-up and without normalised queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.organic.plant import OrganicPlant
from kalmanguard.models.chartransformer import CharTransformerPlant
from kalmanguard.models.plant import untraced
from kalmanguard.models.recipe import OptimizerName


class HotTransformer(CharTransformerPlant, OrganicPlant):
    """The reference transformer at ten times its learning rate, from the first step on.

    Nothing bounds the logits of its attention: they grow with the weights of queries and keys until the softmax
    picks single positions and passes no gradient. The loss does not rise, it stays high.

    References
    ----------
    Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", ICLR 2024, section 3.1.
    """

    gauged = "largest attention logit"

    def __init__(self, *, seed: int, steps: int, optimizer: OptimizerName = "adamw", lr: float = 3e-2) -> None:
        super().__init__(seed=seed, size="small", optimizer=optimizer, lr=lr)

    def gauge(self) -> float:
        inputs = self.probe_loader[0][0][:16]
        largest = [0.0]

        def see(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            batch, length, width = output.shape
            heads: int = module_heads[module]
            query, key, _ = output.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            logits = query @ key.transpose(-1, -2) / (width / 3 / heads) ** 0.5
            largest[0] = max(largest[0], float(logits.abs().max()))

        module_heads = {block.attend.split: block.attend.heads for block in self.model.blocks}  # type: ignore[union-attr]
        hooks = [module.register_forward_hook(see) for module in module_heads]
        try:
            with untraced(self.model):
                self.model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return largest[0]


class BurntTransformer(HotTransformer):
    """The same by SGD with momentum at six times its learning rate: here the loss diverges."""

    def __init__(self, *, seed: int, steps: int) -> None:
        super().__init__(seed=seed, steps=steps, optimizer="sgd", lr=0.6)
