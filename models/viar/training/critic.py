"""The discriminator of a tokenizer's training: what it says of reconstructions, and its own steps."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

from .adversarial import AdversarialConfig, adaptive_weight, discriminator_loss, generator_loss
from .guard import poisoned, step_if_finite
from .optim import build_optimizer, set_progress


class Critic:
    """A discriminator that learns beside a tokenizer.

    The tokenizer's loss of each part of a batch asks `against`, which keeps what it was shown; once the
    tokenizer has moved, the loop calls `step`, and the discriminator learns from all of that. One player
    moves after the other because they share the scale of float16's gradients, which each step may change.

    Before `config.start` nothing is shown, and nothing is computed.

    Args:
        module: the discriminator, images (B, 3, H, W) to logits (B, 1, h, w).
        config: settings.
        lr: highest learning rate of the tokenizer.
    """

    def __init__(self, module: nn.Module, config: AdversarialConfig, *, lr: float) -> None:
        self.module, self.config = module, config
        self.lr = lr if config.lr is None else config.lr
        self._shown: list[tuple[Tensor, Tensor]] = []
        self._skipped = torch.zeros(())  # steps left out

    def prepare(self, accelerator: Accelerator) -> None:
        """Hand module and optimiser to Accelerate."""
        optimizer = build_optimizer(self.module, lr=self.lr, betas=self.config.betas, weight_decay=0.0)
        self._wrapped, self.optimizer = accelerator.prepare(self.module, optimizer)
        self._skipped = self._skipped.to(accelerator.device)

    def state_dict(self) -> dict[str, int]:
        """For `Checkpoint`, which is given module and optimiser too."""
        return {"skipped": int(self._skipped)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """For `Checkpoint`."""
        self._skipped = torch.full_like(self._skipped, state["skipped"])

    def against(
        self, images: Tensor, reconstruction: Tensor, *, others: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The tokenizer's adversarial loss of a part of a batch, weighted, and numbers to log.

        Its gradient goes through the discriminator and leaves none there.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: of the same shape, with gradient.
            others: scalar loss that the weight is in proportion to, see `adaptive_weight`.
            last_layer: weight of the decoder's last layer, of any shape.
        """
        self._shown.append((images, reconstruction.detach()))
        frozen = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        loss = generator_loss(functional_call(self.module, frozen, (reconstruction,)))
        weight = self.config.weight * adaptive_weight(others, loss, last_layer)
        return weight * loss, {"adversarial": loss.detach(), "adversarial_weight": weight}

    def step(
        self,
        accelerator: Accelerator,
        progress: float,
        clip: float,
        sound: Tensor,  # scalar, 0 where the tokenizer's step was left out, else 1
    ) -> dict[str, float | Tensor]:
        """Learn from what was shown since the last call, if anything was.

        A step is left out where the tokenizer's was, or where its own loss or gradient is not finite, and
        counted; that count is of the whole run.

        Args:
            accelerator: of `prepare`.
            progress: how far the run is, 0 to 1; the learning rate follows the tokenizer's schedule.
            clip: largest gradient norm.
            sound: on the device, for which the host does not wait.

        Returns:
            Numbers to log.
        """
        if not self._shown:
            return {}
        shown, self._shown = self._shown, []
        set_progress(self.optimizer, progress, lr=self.lr, weight_decay=(0.0, 0.0))
        for images, reconstruction in shown:
            with accelerator.accumulate(self._wrapped), accelerator.autocast():
                both = torch.cat([images.to(reconstruction.dtype), reconstruction])
                loss = discriminator_loss(*self._wrapped(both).chunk(2))
            accelerator.backward(poisoned(loss / sound))
        norm = accelerator.clip_grad_norm_(self._wrapped.parameters(), clip)
        self._skipped = self._skipped + (1 - step_if_finite(self.optimizer, norm))
        self.optimizer.zero_grad(set_to_none=True)
        return {"discriminator": loss.detach(), "discriminator_skipped": self._skipped}
