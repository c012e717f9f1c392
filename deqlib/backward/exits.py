"""Gradients where they leave a piece of the graph: read there, and put there.

A piece is what was recorded between *cuts*, points at which a tape was started (`tape.start_of_tape`), and
its outputs. Its own nodes are those that lead to a cut. Gradient leaves it on the edges to other nodes: to
leaves, and to whatever the tensors that the evaluation captured were made from. These edges are all that is
known of such tensors, so that nothing depends on who used them, where, and through which function.

An edge can be asked for its gradient, but a graph has no place to put one. Both are done by a hook on the
node before the edge. It acts in one backward pass of the engine alone, a *pass*, and not in those inside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._compiler import uncompiled
from .._torch import at_end_of_pass, current_pass

_KEY = "deqlib exits"  # of what the metadata of a node hold


class _Pass:
    """What is done in one backward pass to the gradients that leave some nodes.

    Attributes:
        added: by node and place among its edges: gradients to add.
        wanted: by node and place: the gradient that left, once it did; it goes no further.
    """

    def __init__(self, wanted: Iterable[tuple[object, int]] = ()) -> None:
        self.added: dict[object, dict[int, Tensor]] = {}
        self.wanted: dict[object, dict[int, Tensor | None]] = {}
        for key, place in wanted:
            self.wanted.setdefault(key, {})[place] = None

    @classmethod
    def current(cls) -> _Pass:
        """That under way."""
        found = _passes.get(current_pass())
        if found is None:
            found = _passes[current_pass()] = cls()
            at_end_of_pass(partial(_hold, found))  # the engine alone keeps it, also where the pass fails
        return found

    def leave(self, key: object, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        """What leaves a node instead of `gradients`; `None`: these."""
        added, wanted = self.added.pop(key, {}), self.wanted.get(key, {})
        if not added and not wanted:
            return None
        found = list(gradients)
        for place, gradient in added.items():
            natural = found[place]
            if natural is not None:  # else nobody asked for it
                found[place] = natural + gradient
        for place in wanted:
            gradient_there = found[place]
            if gradient_there is not None:
                wanted[place], found[place] = gradient_there, torch.zeros_like(gradient_there)
        return tuple(found)


_passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()  # by number, those under way


def _hold(_: _Pass) -> None:
    """Keep a pass as long as the engine keeps this call."""


def _leave(key: object, gradients: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...] | None:
    """The hook."""
    there = _passes.get(current_pass())
    return None if there is None else there.leave(key, gradients)


@dataclass(frozen=True)
class Exit:
    """An edge on which gradient leaves a piece.

    Attributes:
        key: of the node before it. The node itself would keep the graph alive.
        place: of the edge among those of the node.
        target: where it leads.
    """

    key: object
    place: int
    target: GradientEdge


def exits_of(outputs: Sequence[Tensor], cuts: Sequence[Tensor]) -> tuple[list[Exit], list[bool]]:
    """Where gradient leaves the piece between `outputs` and `cuts`, and which outputs belong to it.

    An output that does not depend on the cuts is none of the piece's; one may be a cut itself.
    """
    starts = {cut.grad_fn for cut in cuts}
    ends, inside = set(starts), _leading_to(starts, outputs)
    # A solve inside the evaluation has a piece of its own, between its node and its cuts. What leaves that is
    # to leave this piece too, so all of it belongs to this one.
    while (
        new := {cut for node, leads in inside.items() if leads for cut in getattr(node, "starts", ())} - ends
    ):
        ends |= new
        inside = _leading_to(ends, outputs)
    exits = []
    for node, leads in inside.items():
        if not leads:
            continue
        for place, (target, number) in enumerate(node.next_functions):
            if target is not None and not inside.get(target, True):
                exits.append(Exit(_watched(node), place, GradientEdge(target, number)))
    return exits, [output.grad_fn in starts or inside.get(output.grad_fn, False) for output in outputs]


def pull(
    vectors: Sequence[Tensor], outputs: Sequence[Tensor], cuts: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Exit], list[Tensor | None]]:
    """Gradients of a piece, recorded.

    Args:
        vectors: gradients of the outputs.
        outputs: of the piece.
        cuts: of the piece.

    Returns:
        The gradients at the cuts; where others leave; these. `None`: none arrives.
    """
    exits, inside = exits_of(outputs, cuts)
    within = _Pass((exit_.key, exit_.place) for exit_ in exits)
    used = [i for i, there in enumerate(inside) if there]
    if not used:
        return [None] * len(cuts), [], []
    begun = _Begin.apply(within, *(outputs[i] for i in used))  # type: ignore[no-untyped-call]
    targets = list({exit_.target: None for exit_ in exits})
    # The targets are asked for so that the nodes before them compute what leaves; they themselves get zeros,
    # which is what hooks on tensors see that are called once more than in a pass of their own.
    found = torch.autograd.grad(
        begun,
        cast(Any, [*cuts, *targets]),  # tensors and edges at once, as autograd allows
        [vectors[i] for i in used],
        retain_graph=True,
        create_graph=True,
        allow_unused=True,
    )
    left = [within.wanted[exit_.key][exit_.place] for exit_ in exits]
    return list(found[: len(cuts)]), exits, left


def deliver(exits: Sequence[Exit], gradients: Sequence[Tensor | None]) -> None:
    """In the pass under way, let these gradients leave there, besides what leaves anyway.

    The piece must still be reached in this pass; zeros that its outputs get do that.
    """
    added = _Pass.current().added
    for exit_, gradient in zip(exits, gradients, strict=True):
        if gradient is not None:
            places = added.setdefault(exit_.key, {})
            before = places.get(exit_.place)
            places[exit_.place] = gradient if before is None else before + gradient


def _leading_to(ends: set[Any], outputs: Sequence[Tensor]) -> dict[Any, bool]:
    """All nodes behind `outputs`, up to starts of a tape, and whether they lead to one of `ends`."""
    leads: dict[Any, bool] = {}
    pending: list[tuple[Any, bool]] = [(output.grad_fn, False) for output in outputs]
    while pending:
        node, is_left = pending.pop()
        if node is None or getattr(node, "starts_tape", False):
            continue
        following = [target for target, _ in node.next_functions]
        if is_left:
            leads[node] = any(target in ends or leads.get(target, False) for target in following)
        elif node not in leads:
            leads[node] = False  # until all behind it is known
            pending.append((node, True))
            pending.extend((target, False) for target in following if target not in leads)
    return leads


def _watched(node: Any) -> object:
    """The key of a node that has the hook."""
    if _KEY not in node.metadata:
        key = node.metadata[_KEY] = object()
        node.register_hook(partial(_leave, key))
    return node.metadata[_KEY]


class _Begin(torch.autograd.Function):
    """Identity. What runs first in a backward pass; makes its `within` known as the pass under way."""

    @staticmethod
    def forward(ctx: Any, within: _Pass, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.within = within
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *gradients: Any) -> Any:
        _passes[current_pass()] = ctx.within
        return None, *gradients
