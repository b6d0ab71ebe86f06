"""Policy gradients on gymnasium's CartPole, where the network itself decides what data it will see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss

from kalmanguard.errors import ConfigurationError

from .plant import Plant, initialised_with
from .recipe import OptimizerName, ScheduleName, make_optimizer, make_schedule
from .stream import Batch, BatchStream, in_batches, seeded

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

_LONGEST, _EVALUATED = 200, 500  # steps of an episode, in training and in evaluation
_DISCOUNT = 0.99
_RETURNS = 1 / (1 - _DISCOUNT)  # the largest discounted return, which the value head is scaled by
_VALUE_WEIGHT, _ENTROPY_WEIGHT = 0.5, 0.01
_PROBE, _HELD_OUT, _EPISODES = 1, 2, 3
_STATES = 512  # each, in the probe and held out
_BOX = np.array([1.2, 1.0, 0.1, 1.0])  # about what good policies visit


class ActorCritic(nn.Module):
    """Two hidden layers of 64 tanh units for the policy, and two of their own for the value."""

    def __init__(self, *, hidden: int = 64) -> None:
        super().__init__()
        self.actor = _layers(hidden, 2)
        self.critic = _layers(hidden, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Map states ``(B, 4)`` to ``(B, 3)``: logits of pushing left and right, and the scaled value."""
        return torch.cat([self.actor(states), self.critic(states)], 1)


class CartPolePlant(Plant):
    r"""REINFORCE with a learned value as baseline on CartPole-v1; 9,155 parameters.

    Drawing a batch plays ``batch_size`` episodes of at most 200 steps with the present policy: states, and for each the
    action that was taken and the discounted return that came of it. Environments and actions are seeded by the number
    of the batch, so that the same number with the same parameters is the same batch.

    The plant is judged without an environment, on fixed states :math:`s` that are uniform over a box, by the expected
    regret of the policy against a reference:

    .. math:: \sum_a \pi(a \mid s) \, \frac{|k^T s|}{E |k^T s|} \, 1[a \ne \operatorname{sign}(k^T s)],

    with :math:`k` the gain of the linear-quadratic regulator of the linearised system. This is, scaled, what the push
    :math:`a` costs over the better one in the regulator's cost-to-go :math:`s^T P s` of the next state, which differs
    between both pushes by a multiple of :math:`k^T s`. The reference has 0, chance and a constant push have 1/2, the
    opposite of the reference has 1.

    It tells a policy that balances from one that was destroyed, but does not rank good ones: policies of regret 0.07
    were seen to keep the pole up for 220 steps and for 402. It does not see states outside the box, nor the value, so
    that damage to the critic shows only through what the policy learns from it.

    Parameters
    ----------
    seed
        Of the initial weights, of the environments and of the actions.
    batch_size
        Episodes per step.
    optimizer
        ``"adamw"`` or ``"sgd"``.
    lr
        Learning rate; by default 3e-3 for AdamW and 0.05 for SGD.
    momentum
        Heavy-ball coefficient of SGD; AdamW ignores it.
    schedule, steps
        Learning-rate schedule (see `make_schedule`) and its length in steps.
    device
        Where the model and all batches live.

    Raises
    ------
    ConfigurationError
        gymnasium is not installed, or an option is out of range.

    Notes
    -----
    Held-out loss, seeds 0, 1 and 2, from 0.52, 0.51, 0.49: 0.16, 0.16, 0.12 after 25 steps and 0.064, 0.095, 0.081
    after 50. From then on nearly all training episodes reach their limit, standardised advantages are mostly noise, and
    the policy wanders: its regret goes up and down between 0.02 and 0.1, which a supervisor may take for damage.

    References
    ----------
    Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", Machine
    Learning 8 (1992). Barto, Sutton and Anderson, "Neuronlike Adaptive Elements That Can Solve Difficult Learning
    Control Problems", IEEE Transactions on Systems, Man, and Cybernetics 13 (1983). What a regret at a state has to do
    with the return: Kakade and Langford, "Approximately Optimal Approximate Reinforcement Learning", ICML (2002).
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        batch_size: int = 8,
        optimizer: OptimizerName = "adamw",
        lr: float | None = None,
        momentum: float = 0.9,
        schedule: ScheduleName | None = None,
        steps: int = 400,
        device: torch.device | str = "cpu",
    ) -> None:
        place = torch.device(device)
        with initialised_with(seed):
            model = ActorCritic().to(place)
        self._actor = model.actor
        lr = lr if lr is not None else 3e-3 if optimizer == "adamw" else 0.05
        trainer = make_optimizer(model.parameters(), optimizer, lr=lr, momentum=momentum)
        super().__init__(
            name="cartpole",
            model=model,
            optimizer=trainer,
            scheduler=make_schedule(trainer, schedule, steps=steps),
            loader=_Episodes(model.actor, seed=seed, batch_size=batch_size, device=place),
            probe_loader=in_batches(*_judged_states(_PROBE), batch_size=128, device=place),
            held_out=in_batches(*_judged_states(_HELD_OUT), batch_size=512, device=place),
        )

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        """Expected regrets ``(B,)`` of policies ``(B, 3)``, given those of both pushes ``(B, 2)``."""
        return (output[:, :2].softmax(1) * target).sum(1)

    def step_loss(self, batch: Batch) -> Tensor:
        """Loss of the policy with standardised advantages, of the value and of the entropy."""
        states, (actions, returns) = batch[0], batch[1].unbind(1)
        output = self.model(states)
        values = output[:, 2]
        scaled = returns / _RETURNS
        advantages = scaled - values.detach()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        logs = log_softmax(output[:, :2], 1)
        policy = -(advantages * logs.gather(1, actions.long()[:, None])[:, 0]).mean()
        entropy = -(logs.exp() * logs).sum(1).mean()
        loss: Tensor = policy + _VALUE_WEIGHT * mse_loss(values, scaled) - _ENTROPY_WEIGHT * entropy
        return loss

    def mean_length(self, episodes: int = 64) -> float:
        """Mean length of evaluation episodes, at most 500: seeds of their own, and always the likelier push."""
        _, _, alive = _play(self._actor, _make(episodes), seeded(1_983, _EPISODES), longest=_EVALUATED, greedy=True)
        return float(alive.sum(0).float().mean())


class _Episodes(BatchStream):
    """Batches of whole episodes, played by the model as it is when the batch is drawn."""

    def __init__(self, actor: nn.Module, *, seed: int, batch_size: int, device: torch.device) -> None:
        super().__init__(seed=seed, batch_size=batch_size, device=device)
        self._actor = actor
        self._environments = _make(batch_size)

    def batch(self, index: int) -> Batch:
        """Return batch number ``index`` under the present policy, on the CPU."""
        states, actions, alive = _play(self._actor, self._environments, seeded(self.seed, index), longest=_LONGEST)
        returns = torch.zeros(alive.shape)
        future = torch.zeros(alive.shape[1])
        for step in range(len(alive) - 1, -1, -1):
            future = alive[step] * (1 + _DISCOUNT * future)
            returns[step] = future
        return states[alive], torch.stack([actions[alive].float(), returns[alive]], 1)


def _make(count: int) -> VectorEnv[Any, Any, Any]:
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigurationError(
            "The plant cartpole needs gymnasium, which is not installed: pip install 'kalmanguard[rl]'."
        ) from error
    environments: VectorEnv[Any, Any, Any] = gymnasium.make_vec(
        "CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point"
    )
    return environments


def _play(
    actor: nn.Module,
    environments: VectorEnv[Any, Any, Any],
    generator: torch.Generator,
    *,
    longest: int,
    greedy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Play one episode in every environment: states ``(T, N, 4)``, actions and whether they were taken ``(T, N)``."""
    device = next(actor.parameters()).device
    present, _ = environments.reset(seed=int(torch.randint(2**31, (), generator=generator)))
    chances = torch.rand(longest, len(present), generator=generator)
    if greedy:
        chances.fill_(0.5)
    alive = torch.ones(len(present), dtype=torch.bool)
    played: list[tuple[Tensor, Tensor, Tensor]] = []
    while bool(alive.any()) and len(played) < longest:
        states = torch.from_numpy(present)
        with torch.no_grad():
            left, right = actor(states.to(device)).cpu().unbind(1)
        actions = ((right - left).sigmoid() > chances[len(played)]).long()
        played.append((states, actions, alive))
        present, _, terminated, truncated, _ = environments.step(actions.numpy())
        alive = alive & ~torch.from_numpy(terminated | truncated)
    states, actions, taken = (torch.stack(column) for column in zip(*played, strict=True))
    return states, actions, taken


def _judged_states(split: int) -> Batch:
    """States uniform over a box, and what each push costs there; the worse of both costs 1 on average."""
    from scipy.linalg import solve_discrete_are

    # Linearised about the upright pole: x, its rate, the angle and its rate; Euler steps of 0.02 s, as in gymnasium.
    gravity, cart, pole, half, step = 9.8, 1.0, 0.1, 0.5, 0.02
    inertia = half * (4 / 3 - pole / (cart + pole))
    drift, push = np.zeros((4, 4)), np.zeros((4, 1))
    drift[0, 1] = drift[2, 3] = 1.0
    drift[3, 2], push[3, 0] = gravity / inertia, -1 / (cart + pole) / inertia
    drift[1, 2], push[1, 0] = -pole * half / (cart + pole) * drift[3, 2], (1 - pole * half * push[3, 0]) / (cart + pole)
    drift, push = np.eye(4) + step * drift, step * push
    cost = solve_discrete_are(drift, push, np.diag(_BOX**-2.0), np.array([[0.01]]))
    force = (-push.T @ cost @ drift)[0]  # parallel to the regulator's gain
    states = (2 * torch.rand(_STATES, 4, dtype=torch.float64, generator=seeded(1_983, split)) - 1) * torch.from_numpy(
        _BOX
    )
    wanted = states @ torch.from_numpy(force)
    regrets = torch.stack([wanted.clamp(min=0), (-wanted).clamp(min=0)], 1)
    return states.float(), (regrets / wanted.abs().mean()).float()


def _layers(hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
    )
