"""A generative adversarial network on digits: two networks, two optimizers, and a training loss that says little."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from .digits import load_digits
from .plant import Plant, initialised_with
from .recipe import ScheduleName, make_optimizer, make_schedule
from .stream import Batch, ShuffledStream, in_batches, seeded

_LATENT = 16
_SAMPLES = 16  # that are held against one digit
_PROBE, _HELD_OUT = 1, 2


class GAN(nn.Module):
    """A generator with BatchNorm and a discriminator without, each with two hidden layers of 128 units.

    Attributes
    ----------
    generate
        Latents ``(N, 16)`` to images ``(N, 64)`` within [-1, 1].
    discriminate
        Images ``(N, 64)`` to logits ``(N, 1)`` of being real.
    """

    def __init__(self, *, hidden: int = 128) -> None:
        super().__init__()
        self.generate = nn.Sequential(
            *(nn.Linear(_LATENT, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Linear(hidden, 64), nn.Tanh()),
        )
        self.discriminate = nn.Sequential(
            *(nn.Linear(64, hidden), nn.LeakyReLU(0.2)),
            *(nn.Linear(hidden, hidden), nn.LeakyReLU(0.2)),
            nn.Linear(hidden, 1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents ``(..., 16)`` to generated images ``(..., 64)`` within [-1, 1]."""
        images: Tensor = self.generate(latents.flatten(0, -2))
        return images.view(*latents.shape[:-1], 64)


class GANPlant(Plant):
    r"""`GAN` on scikit-learn's digits; 52,161 parameters, two optimizers.

    A training batch is ``(images, latents)``. Both networks follow the gradients of their own losses at the same point
    and step together, the generator first:

    .. math:: -\log D(G(z)) \qquad \text{and} \qquad
        -\log D(x) - \log(1 - D(G(z))) + \tfrac{1}{2} \|\nabla_x \operatorname{logit} D(x)\|^2.

    The training loss that is reported is the sum of both, which does not fall as the images get better. The penalty is
    what makes the two converge; without it they circle each other for some hundred steps.

    The plant is judged by the energy score instead, which needs no discriminator: a batch of the probe is ``(latents,
    digits)``, each digit :math:`y` is held against its own :math:`m = 16` samples :math:`x_i` from latents that were
    drawn once, and its loss is

    .. math:: \frac{1}{m} \sum_i \|x_i - y\| - \frac{1}{2 m (m - 1)} \sum_{i \ne j} \|x_i - x_j\|.

    It is strictly proper: the expectation is least, and then not zero, where the generator has the distribution of the
    digits. A generator of noise loses by the first term and a collapsed one by the second. Given the networks, the
    losses of different digits are independent. Euclidean distances between pixels see little of how sharp an image is,
    and nothing of the discriminator is in it: damage there shows only through what the generator learns from it.

    Parameters
    ----------
    seed
        Of the initial weights, of the order of the data and of the latents.
    batch_size
        Training examples per step, at least 2 for BatchNorm.
    lr
        Learning rate of both optimizers, AdamW with a first-moment decay of 0.5.
    schedule, steps
        Learning-rate schedule (see `make_schedule`) and its length in steps.
    device
        Where the model and all batches live.

    Notes
    -----
    Held-out loss, seeds 0, 1 and 2, from 6.46, 6.51, 6.45: 3.06, 3.08, 3.08 after 400 steps (``kalmanguard run gan
    --seed 0``) and 3.09, 3.10, 3.12 after 1,000. Held-out digits in the place of samples have 3.04 on the probe's
    digits, the mean digit has 4.34, one and the same digit 6.01, uniform noise 4.94. A step takes 5 ms on one core.

    References
    ----------
    Goodfellow et al., "Generative Adversarial Nets", NeurIPS (2014), section 3. Penalty: Mescheder, Geiger and Nowozin,
    "Which Training Methods for GANs do actually Converge?", ICML (2018), Eq. 9. Energy score: Gneiting and Raftery,
    "Strictly Proper Scoring Rules, Prediction, and Estimation", JASA 102 (2007), section 4.3.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        batch_size: int = 64,
        lr: float = 1e-3,
        schedule: ScheduleName | None = None,
        steps: int = 400,
        device: torch.device | str = "cpu",
    ) -> None:
        place = torch.device(device)
        digits = load_digits()
        low, high = digits.train_inputs.amin(), digits.train_inputs.amax()
        train, probe, held_out = (
            2 * (rows - low) / (high - low) - 1
            for rows in (digits.train_inputs, digits.probe_inputs, digits.held_out_inputs)
        )
        loader = _WithLatents(train, digits.train_targets, seed=seed, batch_size=batch_size, device=place)
        with initialised_with(seed):
            model = GAN().to(place)
        trainers = [
            make_optimizer(network.parameters(), "adamw", lr=lr, betas=(0.5, 0.999))
            for network in (model.generate, model.discriminate)
        ]
        schedules = [make_schedule(trainer, schedule, steps=steps) for trainer in trainers]
        super().__init__(
            name="gan",
            model=model,
            optimizer=trainers,
            scheduler=[made for made in schedules if made is not None],
            loader=loader,
            probe_loader=in_batches(_latents(probe, _PROBE), probe, batch_size=128, device=place),
            held_out=in_batches(_latents(held_out, _HELD_OUT), held_out, batch_size=512, device=place),
        )

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        """Energy scores ``(B,)`` of samples ``(B, m, 64)`` for digits ``(B, 64)``."""
        apart = torch.linalg.vector_norm(output - target[:, None], dim=2).mean(1)
        samples = output.shape[1]
        spread = torch.cdist(output, output, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2))
        scores: Tensor = apart - spread / (2 * samples * (samples - 1))
        return scores

    def step_loss(self, batch: Batch) -> Tensor:
        """Sum of the losses of both networks; neither has a gradient with respect to the other's parameters."""
        model = self.model
        assert isinstance(model, GAN)
        images, latents = batch
        images = images.detach().requires_grad_()
        generated = model(latents)
        real, fake = model.discriminate(images), model.discriminate(generated.detach())
        (slopes,) = torch.autograd.grad(real.sum(), images, create_graph=True)
        frozen = {name: parameter.detach() for name, parameter in model.discriminate.named_parameters()}
        judged = functional_call(model.discriminate, frozen, (generated,))
        ones = torch.ones_like(real)
        discriminator = cross_entropy(real, ones) + cross_entropy(fake, torch.zeros_like(real))
        penalty = slopes.square().sum(1).mean() / 2
        loss: Tensor = discriminator + penalty + cross_entropy(judged, ones)
        return loss


class _WithLatents(ShuffledStream):
    """The images in a fresh random order every epoch, each with a latent vector that is drawn anew."""

    def batch(self, index: int) -> Batch:
        """Return batch number ``index``, counted from 0, on the CPU."""
        images, _ = super().batch(index)
        return images, torch.randn(len(images), _LATENT, generator=seeded(self.seed, index, 1))


def _latents(digits: Tensor, split: int) -> Tensor:
    return torch.randn(len(digits), _SAMPLES, _LATENT, generator=seeded(2_014, split))
