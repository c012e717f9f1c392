"""The next-scale transformer: VAR with an explicit trunk, VIAR with an implicit one.

- class-conditional, with a null class for guidance
- learned absolute positions and scale embeddings
- AdaLN-modulated blocks, own or shared modulation
- block-causal attention, optionally with normalised queries and keys
- the trunk decides between a stack of blocks and an implicit block

Shape letters: B batch, K scales of side p_k, L = sum p_k^2 tokens, C width, V codebook, Z code channels,
N classes.
"""

from __future__ import annotations

from typing import Any, Literal, Self, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kinds import check_tensor, checked
from ..pretrained import Pretrained
from .blocks import norm
from .config import ExplicitTrunkConfig, ImplicitTrunkConfig, TransformerConfig, TrunkConfig, filled
from .execution import fails_on_device, in_type_of
from .graphs import Graphs
from .implicit import ImplicitTrunk
from .init import init_weights
from .scales import BlockCausal, block_causal, scale_ids, scale_slices
from .schedule import Adaptive
from .trunk import ExplicitTrunk, Trunk


class NextScaleTransformer(nn.Module, Pretrained):
    """Predicts the tokens of each scale from the class and the scales before.

    (VAR: Tian et al. 2024, arXiv 2404.02905; VIAR: arXiv 2605.01220.)

    `save_pretrained(path)` writes config.json and model.safetensors, `from_pretrained(path_or_hub_id)`
    reads them; missing or unexpected weights are an error unless `strict=False` is given.

    Args:
        config: sizes and trunk, or what their `to_dict` gives; `trunk=ImplicitTrunkConfig(...)` makes it
            a VIAR.
    """

    telling = "trunk"
    graphs: Graphs | None = None  # of generations, see `viar.prepare_inference`; None: they run eagerly
    scale_ids: Tensor  # (L,) int64, the scale of every token
    first_mask: Tensor | None  # of the first group of scales, see `BlockCausal.mask_ll`

    @checked
    def __init__(self, config: TransformerConfig | dict[str, Any]) -> None:
        super().__init__()
        if isinstance(config, dict):  # how from_pretrained hands over config.json
            config = TransformerConfig.from_dict(config)
        self.config = config
        # What the mixin writes to config.json; left alone it would flatten the dataclass itself.
        self._hub_mixin_config = config.to_dict()
        C, sides = filled(config.width), config.sides
        num_tokens, first = sum(side * side for side in sides), sides[0] ** 2
        self.class_embed = nn.Embedding(config.num_classes + 1, C)
        self.pos_start = nn.Parameter(torch.empty(1, first, C))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, C))
        self.level_embed = nn.Embedding(len(sides), C)
        self.input_projection = nn.Linear(config.code_channels, C)
        self.shared_modulation = nn.Linear(C, 6 * C) if config.shared_modulation else None
        self.trunk = build_trunk(config)
        self.head_modulation = nn.Linear(C, 2 * C)
        self.head = nn.Linear(C, config.codebook_size)
        self.group_sizes, first_mask = block_causal(sides)
        self.register_buffer("first_mask", first_mask, persistent=False)
        self.register_buffer("scale_ids", scale_ids(sides), persistent=False)
        self.register_load_state_dict_post_hook(_derive)  # type: ignore[no-untyped-call]
        init_weights(
            self,
            positions=(self.pos_start, self.pos_embed),
            head_modulation=self.head_modulation,
            head=self.head,
            width=C,
            depth=config.depth,
        )
        self.trunk.init_own()

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As in PyTorch; what follows from the config alone is there at once.

        Args:
            device: where the parameters without values go.
            recurse: also those of the modules inside.
        """
        super().to_empty(device=device, recurse=recurse)
        _derive(self)
        return self

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Keep for the backward pass what goes into blocks, and evaluate them again there.

        Losses stay as they are, bit for bit, and gradients up to the order of sums. A step then keeps one
        tensor (B, L, C) a block and an iteration on the tape, and the activations of one block at a time; it
        costs their evaluation once more. What `ImplicitTrunkConfig.jacobian_weight` needs is kept whole.

        Args:
            enabled: false keeps all activations again.
        """
        self.trunk.checkpoint_activations = enabled

    @property
    def wide_type(self) -> torch.dtype:
        """Type that embeddings, positions, head and logits have: that of the weights, at least float32."""
        return torch.promote_types(self.head.weight.dtype, torch.float32)

    @property
    def null_class(self) -> int:
        """Index of the class that stands for "no class"."""
        return self.config.num_classes

    @overload
    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        iterations: int | Adaptive | None = ...,
        *,
        generator: torch.Generator | None = ...,
        return_penalty: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        iterations: int | Adaptive | None = ...,
        *,
        generator: torch.Generator | None = ...,
        return_penalty: Literal[True],
    ) -> tuple[Tensor, Tensor | None]: ...
    def forward(
        self,
        labels: Tensor,  # (B,) integers in [0, N], N the null class
        inputs: Tensor,  # (B, L - p_1^2, Z), from `Tokenizer.next_scale_inputs`
        iterations: int | Adaptive | None = None,
        *,
        generator: torch.Generator | None = None,
        return_penalty: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits (B, L, V) of all scales at once, teacher-forced, float32.

        In training mode each label becomes the null class with probability `label_dropout`.

        Args:
            labels: class of each sample; see `check_labels`.
            inputs: what each scale after the first is predicted from.
            iterations: of the implicit block, outside gradient recording; default the config's.
            generator: draws the number of iterations while gradients are recorded, on the CPU; default
                PyTorch's own, which label dropout and drop path draw from in any case. Give processes that
                train together generators of one seed.
            return_penalty: return (logits, penalty), the penalty a scalar to add to the loss, or `None`
                without `ImplicitTrunkConfig.residual_weight` or `jacobian_weight`, or outside gradient
                recording.

        Raises:
            ValueError: labels out of range, see `check_labels`; inputs of another shape, `iterations` where
                they do not apply.
            TypeError: `iterations` that are not those of a single solve.
        """
        self.check_labels(labels)
        check_tensor("inputs", inputs)
        if not inputs.is_floating_point():
            raise ValueError(f"inputs: expected floating point, got {inputs.dtype}")
        if not isinstance(return_penalty, bool):
            raise TypeError(f"return_penalty: expected True or False, got {type(return_penalty).__name__}")
        labels = labels.long()  # narrower ones cannot be looked up, nor hold every null class
        expected = (
            labels.shape[0],
            self.pos_embed.shape[1] - self.pos_start.shape[1],
            self.config.code_channels,
        )
        if not labels.device == inputs.device == self.pos_embed.device:
            raise ValueError(
                f"labels, inputs: expected both on the model's device, {self.pos_embed.device}, got "
                f"{labels.device} and {inputs.device}"
            )
        if inputs.shape != expected:
            raise ValueError(f"inputs: expected shape {expected}, got {tuple(inputs.shape)}")
        if not (iterations is None or isinstance(iterations, int | Adaptive)):
            raise TypeError(
                "iterations: all scales are solved together here, expected an int or viar.Adaptive, "
                f"got {iterations!r}"
            )
        if iterations is not None:
            self.trunk.schedule(iterations)  # refuses what does not apply
        if self.training and self.config.label_dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = torch.where(dropped, self.null_class, labels)
        embedding_BC, cond = self.condition(labels)
        with torch.autocast(labels.device.type, enabled=False):
            x_BLC = torch.cat([self._start(embedding_BC), self._project(inputs)], 1)
            x_BLC = x_BLC + self._positions(slice(None))
        output = self.trunk(
            x_BLC.to(self.trunk.weight_type),
            self.trunk.modulate(cond.to(self.trunk.weight_type)),
            causal=BlockCausal(self.group_sizes, self.first_mask),
            iterations=iterations,
            generator=generator,
        )
        logits_BLV = self.logits(output.x_BLC, embedding_BC)
        return (logits_BLV, output.penalty) if return_penalty else logits_BLV

    def condition(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Class embedding (B, C), and what the blocks are modulated by: (B, C) or (B, 6, C).

        Args:
            labels: (B,) classes in [0, N].
        """
        embedding_BC = self.class_embed(labels).to(self.wide_type)
        if self.shared_modulation is None:
            return embedding_BC, embedding_BC
        modulate = in_type_of(embedding_BC, self.shared_modulation)
        return embedding_BC, torch.unflatten(modulate(F.silu(embedding_BC)), 1, (6, -1))

    def embed_scale(
        self,
        scale: int,
        embedding_BC: Tensor,
        next_input: Tensor | None,  # (B, Z, p_k, p_k) from `MultiScaleQuantizer.next_input`; None at scale 0
    ) -> Tensor:
        """Tokens (B, p_k^2, C) that go into the trunk for one scale.

        Args:
            scale: k, from 0.
            embedding_BC: from `condition`.
            next_input: what the scales before say of this one; `None` at scale 0.
        """
        with torch.autocast(embedding_BC.device.type, enabled=False):
            if next_input is None:
                x_BLC = self._start(embedding_BC)
            else:
                x_BLC = self._project(next_input.flatten(2).transpose(1, 2))
            return x_BLC + self._positions(scale_slices(self.config.sides)[scale])

    def logits(self, x_BLC: Tensor, embedding_BC: Tensor) -> Tensor:
        """Modulated head in float32, (B, L, V)."""
        with torch.autocast(x_BLC.device.type, enabled=False):
            return self.classify(self.head_input(x_BLC, self.modulate_head(embedding_BC)))

    def classify(
        self,
        hidden_BLC: Tensor,  # from `head_input`
    ) -> Tensor:
        """The last linear layer, (B, L, V), in the type of its input, under autocast too."""
        with torch.autocast(hidden_BLC.device.type, enabled=False):
            return in_type_of(hidden_BLC, self.head)(hidden_BLC)

    def modulate_head(self, embedding_BC: Tensor) -> Tensor:
        """1 + scale and shift of the head, (2, B, 1, C); the same for all scales."""
        embedding_BC = embedding_BC.to(self.wide_type)
        modulate = in_type_of(embedding_BC, self.head_modulation)
        with torch.autocast(embedding_BC.device.type, enabled=False):
            scale, shift = modulate(F.silu(embedding_BC)).unsqueeze(1).chunk(2, 2)
            return torch.stack([1 + scale, shift])

    def head_input(
        self,
        x_BLC: Tensor,
        modulation: Tensor,  # (2, B, 1, C), from `modulate_head`
    ) -> Tensor:
        """What the last linear layer takes, (B, L, C), at least float32."""
        scale, shift = modulation
        return torch.addcmul(shift, norm(x_BLC.to(self.wide_type)), scale)

    def check_labels(self, labels: Tensor) -> None:
        """Raise `ValueError` unless `labels` is (B,) of classes in [0, N].

        Labels on a CUDA device are not read, for which the host would have to wait: others than these end
        with a device-side assertion when their embeddings are looked up.

        Args:
            labels: to check; where it can be chosen, before they are moved to the device.
        """
        check_tensor("labels", labels)
        if labels.is_meta and not self.pos_embed.is_meta:
            raise ValueError(f"labels: expected numbers, got {labels.dtype} on the meta device")
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.dim() != 1 or not is_integer:
            raise ValueError(
                f"labels: expected integers of shape (B,), got {labels.dtype} {tuple(labels.shape)}"
            )
        if labels.numel() and not fails_on_device(labels):
            low, high = int(labels.long().min()), int(labels.long().max())
            if low < 0 or high > self.null_class:
                raise ValueError(
                    f"labels: expected classes 0 to {self.null_class - 1}, or {self.null_class} for none, "
                    f"got values from {low} to {high}"
                )

    def _project(self, inputs_BlZ: Tensor) -> Tensor:
        inputs_BlZ = inputs_BlZ.to(self.wide_type)
        return in_type_of(inputs_BlZ, self.input_projection)(inputs_BlZ)

    def _start(self, embedding_BC: Tensor) -> Tensor:
        return embedding_BC.unsqueeze(1) + self.pos_start

    def _positions(self, where: slice) -> Tensor:
        positions: Tensor = self.level_embed(self.scale_ids[where]) + self.pos_embed[:, where]
        return positions


def _derive(model: NextScaleTransformer, _: object = None) -> None:
    """Compute what follows from the config alone anew.

    No state dict has it, so that a model made on the meta device and then filled would have no values there,
    or any.
    """
    # Whatever the default device is, and for training too where weights were loaded in inference mode.
    with torch.device(model.pos_embed.device), torch.inference_mode(False):
        model.first_mask = block_causal(model.config.sides).mask_ll
        model.scale_ids = scale_ids(model.config.sides)


TRUNKS: dict[type[TrunkConfig], type[Trunk]] = {
    ExplicitTrunkConfig: ExplicitTrunk,
    ImplicitTrunkConfig: ImplicitTrunk,
}


def build_trunk(config: TransformerConfig) -> Trunk:
    """The trunk `config.trunk` asks for."""
    return TRUNKS[type(config.trunk)](config)
