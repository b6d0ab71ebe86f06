"""Scenarios on the digits: a deep network that blows up, Adam's late spikes, the edge of stability, weight drift."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim import Optimizer

from benchmarks.organic.plant import CPU, OrganicPlant, RegressionPlant, Whole
from kalmanguard.models.digits import load_digits
from kalmanguard.models.plant import initialised_with
from kalmanguard.models.stream import ShuffledStream, in_batches


class _Classifier(OrganicPlant):
    """A network on the digits, in batches, with cross-entropy."""

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, *, seed: int, batch_size: int) -> None:
        digits = load_digits()
        super().__init__(
            name=name,
            model=model,
            optimizer=optimizer,
            scheduler=None,
            loader=ShuffledStream(
                digits.train_inputs, digits.train_targets, seed=seed, batch_size=batch_size, device=CPU
            ),
            probe_loader=in_batches(digits.probe_inputs, digits.probe_targets, batch_size=128, device=CPU),
            held_out=in_batches(digits.held_out_inputs, digits.held_out_targets, batch_size=512, device=CPU),
        )

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target)

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters() if p.dim() == 2]


class DeepMLP(_Classifier):
    """Eight hidden layers of 128, He initialisation, SGD with momentum 0.9 and no warm-up.

    The learning rate is beyond what so deep a network bears: the activations grow until the loss is NaN.

    References
    ----------
    He, Zhang, Ren and Sun, "Delving deep into rectifiers", ICCV 2015, section 2.2 (the initialisation).
    """

    gauged = "largest weight norm"

    def __init__(self, *, seed: int, steps: int, lr: float = 0.1) -> None:
        with initialised_with(seed):
            model = _perceptron([64, *[128] * 8, 10], nn.ReLU)
            for layer in model:
                if isinstance(layer, nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        super().__init__("deep MLP", model, optimizer, seed=seed, batch_size=64)

    def gauge(self) -> float:
        return max(float(weight.norm()) for weight in self._weights())


class HotDeepMLP(DeepMLP):
    """The same at three times the learning rate, which fails before a supervisor's warm-up is over."""

    def __init__(self, *, seed: int, steps: int) -> None:
        super().__init__(seed=seed, steps=steps, lr=0.3)


class AdamEpsilon(_Classifier):
    """Adam near convergence, with a small epsilon and a short second-moment average.

    When the gradients have shrunk, so has the second moment that divides them; the first larger gradient makes a step
    of the full learning rate in every weight. The training loss falls by orders of magnitude and spikes back.

    References
    ----------
    Molybog et al., "A theory on Adam instability in large-scale machine learning", arXiv:2304.09871.
    """

    gauged = "median of the square root of the second moment"

    def __init__(self, *, seed: int, steps: int) -> None:
        with initialised_with(seed):
            model = _perceptron([64, 32, 32, 10], nn.Tanh)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-16)
        super().__init__("Adam epsilon", model, optimizer, seed=seed, batch_size=64)

    def gauge(self) -> float:
        moments = [s["exp_avg_sq"].flatten() for s in self.optimizer.state.values() if "exp_avg_sq" in s]
        return float(torch.cat(moments).median().sqrt()) if moments else 0.0


class WeightDrift(_Classifier):
    """A network whose hidden weights are followed by normalisation: their norms grow, and nothing depends on them.

    The gradient is orthogonal to a scale-invariant weight, so every step makes the weight longer.

    References
    ----------
    Arora, Li and Lyu, "Theoretical analysis of auto rate-tuning by batch normalization", ICLR 2019, Lemma 2.4.
    """

    gauged = "norm of the scale-invariant weights"

    def __init__(self, *, seed: int, steps: int) -> None:
        with initialised_with(seed):
            model = nn.Sequential(
                *(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False), nn.ReLU()),
                *(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False), nn.ReLU()),
                nn.Linear(64, 10),
            )
        head = {"params": list(model[6].parameters()), "lr": 0.05}
        hidden = {"params": [*model[0].parameters(), *model[3].parameters()], "lr": 1.0}
        super().__init__("weight drift", model, torch.optim.SGD([hidden, head], lr=1.0), seed=seed, batch_size=16)

    def gauge(self) -> float:
        return float(torch.cat([weight.flatten() for weight in self._weights()[:2]]).norm())


class EdgeOfStability(RegressionPlant):
    """Full-batch gradient descent on half the squared error: the sharpness rises to ``2 / eta`` and stays there.

    From then on the loss rises at about two of five steps, and goes on falling over longer times.

    References
    ----------
    Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient descent on neural networks typically occurs at the edge of
    stability", ICLR 2021.
    """

    gauged = "largest weight norm"

    def __init__(self, *, seed: int, steps: int) -> None:
        digits = load_digits()
        with initialised_with(seed):
            model = _perceptron([64, 64, 64, 10], nn.Tanh)
        targets = [
            one_hot(labels, 10).float()
            for labels in (digits.train_targets, digits.probe_targets, digits.held_out_targets)
        ]
        super().__init__(
            name="edge of stability",
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
            scheduler=None,
            loader=Whole(digits.train_inputs, targets[0]),
            probe_loader=in_batches(digits.probe_inputs, targets[1], batch_size=128, device=CPU),
            held_out=in_batches(digits.held_out_inputs, targets[2], batch_size=512, device=CPU),
        )

    def step_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 5 * super().step_loss(batch)  # half the sum over the ten outputs

    def gauge(self) -> float:
        return max(float(p.detach().norm()) for p in self.model.parameters())


def _perceptron(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers = [[nn.Linear(one, other), activation()] for one, other in itertools.pairwise(sizes)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1])
