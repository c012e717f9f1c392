"""A looped character language model: one block, applied as often as a token needs it.

The text is the reference of the language that comes with Python; whole topics of it are held out.
(Recurrent depth: Geiping et al. 2025, arXiv 2502.05171.)
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from deqlib import (
    EquilibriumCache,
    ImplicitLayer,
    KeyValueCache,
    LogNormalPoisson,
    Picard,
    PredictionKL,
    Solution,
    StepCache,
    StochasticJFB,
    Stopping,
)

EVALUATIONS = (1, 2, 3, 4, 6, 8, 16, 32)
THRESHOLDS = (0.1, 0.03, 0.015, 0.007, 0.003)
STARTS = ("A class definition ", "Names of variables ")
CONVERGED = Stopping(rtol=1e-5, max_steps=200, norm_axes=(-1,))  # of every token by itself


def paragraphs(names: Iterable[str]) -> dict[str, None]:
    """Of these topics, in order, each of them once: topics quote one another."""
    return dict.fromkeys(part.strip("\n") for name in names for part in topics[name].split("\n\n"))


def corpus() -> tuple[Tensor, Tensor, str]:
    """Characters to train on, (characters,), others held out, (characters,), and the alphabet they count in.

    Every tenth topic is held out, and with it every paragraph of it that others have too.
    """
    names = sorted(topics)
    held_out = paragraphs(names[3::10])
    seen = [paragraph for paragraph in paragraphs(names) if paragraph not in held_out]
    texts = "\n\n".join(seen), "\n\n".join(held_out)
    alphabet = "".join(sorted(set("".join(texts))))
    train, test = (numbers(text, alphabet) for text in texts)
    return train, test, alphabet


def numbers(text: str, alphabet: str) -> Tensor:
    """The place of every character in the alphabet, (characters,)."""
    return torch.tensor([alphabet.index(character) for character in text])


# --8<-- [start:block]
class LoopedBlock(nn.Module):
    """A transformer block whose output is its next input, with the embedding x added again at every step.

    z -> normalised(h + perceptron(h)), h = z + x + attention(z + x), both of normalised tokens.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, z: Tensor, x: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor]:
        """The next states (B, l, C), and they again as what is read; tokens see those in the cache too."""
        h = z + x
        q, k, v = self.qkv(normalised(h)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=nearness(q, k))
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        h = normalised(h + self.down(F.gelu(self.up(normalised(h)))))
        return h, h


# --8<-- [end:block]


def normalised(tokens: Tensor) -> Tensor:
    """Each of root mean square 1 over its channels, the last axis."""
    return F.rms_norm(tokens, tokens.shape[-1:])


def nearness(
    queries: Tensor,  # (B, H, l, any), of the last l tokens
    keys: Tensor,  # (B, H, L, any), of all of them
) -> Tensor:
    """What attention adds to its scores, (1, H, l, L): the further back the less, and nothing of the future.

    Distances are all that it knows of where a token stands, so the text may be longer than any in training.
    (Press et al. 2022, arXiv 2108.12409.)
    """
    num_new, num_tokens = queries.shape[2], keys.shape[2]
    back = torch.arange(num_tokens - num_new, num_tokens)[:, None] - torch.arange(num_tokens)
    slopes = 2 * 0.25 ** torch.arange(queries.shape[1])
    return (-slopes[:, None, None] * back).masked_fill(back < 0, -math.inf).unsqueeze(0)


# --8<-- [start:deqlib]
def looped(cell: nn.Module, head: nn.Module, mean: float = 8, threshold: float = 0.015) -> ImplicitLayer:
    """While training a random number of steps, the last two with gradient; else until predictions stand."""
    return ImplicitLayer(
        cell,
        solver=Picard(),
        backward=StochasticJFB(no_grad=LogNormalPoisson(mean), grad=1),
        stopping=exit_by(head, threshold),
        on_failure="ignore",
        has_aux=True,  # what the cell returned last: one step more
    )


def exit_by(head: nn.Module, threshold: float, most: int = 32) -> Stopping:
    """A token leaves when a step changes its prediction by at most so much, in nats."""
    return Stopping(
        rtol=0,
        readout=PredictionKL(head=head, threshold=threshold),
        min_steps=1,
        max_steps=most - 1,
        norm_axes=(-1,),
        hold_places=True,
    )


# --8<-- [end:deqlib]


# --8<-- [start:by_hand]
class LoopByHand:
    """The same without deqlib: every step, every exit, and a set of keys and values for every step."""

    def __init__(
        self, cell: nn.Module, head: nn.Module, mean: float = 8, threshold: float = 0.015, most: int = 32
    ) -> None:
        self.cell, self.head, self.mean = cell, head, mean
        self.threshold, self.most = threshold, most

    def train(self, x: Tensor) -> Tensor:
        """A random number of steps, the last two with gradient."""
        rate = self.mean * torch.exp(0.5 * torch.randn(()) - 0.5**2 / 2)
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(int(torch.poisson(rate))):
                z, _ = self.cell(z, x)
        for _ in range(2):
            z, _ = self.cell(z, x)
        return z

    @torch.no_grad()
    def infer(self, x: Tensor, cache: "StepsByHand | None" = None) -> tuple[Tensor, Tensor]:
        """States (B, l, C) and evaluations (B, l), until every token's prediction stands."""
        z = torch.zeros_like(x)
        done = torch.zeros(x.shape[:2], dtype=torch.bool)
        evaluations = torch.zeros(x.shape[:2], dtype=torch.long)
        before = F.log_softmax(self.head(z), -1)
        for step in range(self.most):
            if cache is not None:
                cache.step = step
            evaluations = evaluations + ~done
            following, _ = self.cell(z, x, cache)
            after = F.log_softmax(self.head(following), -1)
            change = (after.exp() * (after - before)).sum(-1)
            if step > 0:
                done = done | (change <= self.threshold)
            if done.all():
                break
            z = torch.where(done[..., None], z, following)
            before = after
        return following, evaluations


class StepsByHand:
    """Keys and values of every loop step, in buffers of their final size."""

    def __init__(self, max_tokens: int, num_steps: int) -> None:
        self.max_tokens, self.num_steps = max_tokens, num_steps
        self.past = self.end = self.step = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def open(self, num_tokens: int) -> None:
        """Make room for the next tokens."""
        if self.end + num_tokens > self.max_tokens:
            raise ValueError(f"no room for {num_tokens} tokens after {self.end}")
        self.past, self.end, self.step = self.end, self.end + num_tokens, 0

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens so far, (B, H, tokens, any)."""
        if self.buffers is None:
            num_sequences, num_heads, _, width = keys.shape
            shape = (self.num_steps, num_sequences, num_heads, self.max_tokens, width)
            self.buffers = keys.new_zeros(shape), values.new_zeros(shape)
        for new, buffer in zip((keys, values), self.buffers, strict=True):
            # Later tokens may take more steps than these: they are to find their last.
            buffer[self.step :, :, :, self.past : self.end] = new
        all_keys, all_values = self.buffers
        return all_keys[self.step, :, :, : self.end], all_values[self.step, :, :, : self.end]


# --8<-- [end:by_hand]


# --8<-- [start:model]
class LoopedLanguageModel(nn.Module):
    """Characters to states, and states to the logits of the next characters."""

    def __init__(self, num_characters: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_characters, width)
        self.head = nn.Linear(width, num_characters)
        self.loop = looped(LoopedBlock(width, num_heads), self.head)

    def solve(
        self, characters: Tensor, cache: KeyValueCache | None = None, stopping: Stopping | None = None
    ) -> Solution:
        """The loop over characters (B, l), which follow those in the cache."""
        if cache is not None:
            cache.open(characters.shape[1])
        return self.loop.solve(self.embed(characters), cache, stopping=stopping)

    def forward(
        self, characters: Tensor, cache: KeyValueCache | None = None, stopping: Stopping | None = None
    ) -> Tensor:
        """Logits of what follows each character, (B, l, alphabet)."""
        return self.head(self.solve(characters, cache, stopping).aux)


# --8<-- [end:model]


# --8<-- [start:train]
def train(model: LoopedLanguageModel, text: Tensor, num_steps: int, batch: int, context: int) -> None:
    """Cross entropy of every next character, in windows drawn anew at every step."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps, pct_start=0.1)
    for _ in range(num_steps):
        starts = torch.randint(len(text) - context, (batch, 1))
        windows = text[starts + torch.arange(context + 1)]
        loss = cross_entropy(model(windows[:, :-1]), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


# --8<-- [end:train]


def cross_entropy(logits: Tensor, characters: Tensor) -> Tensor:
    """Mean over all places, in nats a character."""
    return F.cross_entropy(logits.flatten(0, 1), characters.flatten())


# --8<-- [start:measure]
@torch.no_grad()
def loss_of_all_alike(model: LoopedLanguageModel, windows: Tensor, evaluations: int) -> float:
    """Of windows (B, L + 1), every character by as many evaluations of the block."""
    logits = model(windows[:, :-1], stopping=Stopping.steps(evaluations - 1))
    return cross_entropy(logits, windows[:, 1:]).item()


@torch.no_grad()
def loss_of_each_as_needed(
    model: LoopedLanguageModel, windows: Tensor, threshold: float
) -> tuple[float, float]:
    """Character by character, as when text is written: loss, and evaluations a character."""
    stopping, cache = exit_by(model.head, threshold), EquilibriumCache(windows.shape[1])
    losses, evaluations = [], []
    for new, following in zip(windows[:, :-1].split(1, 1), windows[:, 1:].split(1, 1), strict=True):
        solution = model.solve(new, cache, stopping)
        losses.append(cross_entropy(model.head(solution.aux), following).item())
        evaluations.append(solution.num_steps.float().mean().item() + 1)
    return sum(losses) / len(losses), sum(evaluations) / len(evaluations)


# --8<-- [end:measure]


# --8<-- [start:write]
@torch.no_grad()
def write(
    model: LoopedLanguageModel,
    start: Tensor,  # (B, l)
    num_characters: int,
    cache: KeyValueCache | None = None,
    stopping: Stopping | None = None,
    temperature: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The text (B, l + num_characters) and the logits that each of its last characters was chosen by."""
    generator, text, read, logits = torch.Generator().manual_seed(0), start, 0, []
    for _ in range(num_characters):
        logits.append(model(text[:, read:], cache, stopping)[:, -1])
        read = 0 if cache is None else text.shape[1]
        if temperature:
            chosen = (logits[-1] / temperature).softmax(-1).multinomial(1, generator=generator)
        else:
            chosen = logits[-1].argmax(-1, keepdim=True)
        text = torch.cat([text, chosen], 1)
    return text, torch.stack(logits, 1)


# --8<-- [end:write]


def compare_texts(model: LoopedLanguageModel, start: Tensor, num_characters: int) -> tuple[list[str], Tensor]:
    """What is the same with a cache and without, at convergence, in lines, and the sampled texts (B, any)."""
    lines = []
    for name, temperature in (("greedy", 0.0), ("sampled", 0.7)):
        (plain, expected), (text, logits) = (
            write(model, start, num_characters, cache, CONVERGED, temperature)
            for cache in (None, EquilibriumCache(start.shape[1] + num_characters))
        )
        worst = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
        same = f"{int((plain == text).all(1).sum())} of {len(text)} the same"
        lines.append(f"texts with and without cache, {name}: {same}, logits to {worst:.0e} of their norm")
    return lines, text


@torch.no_grad()
def cache_bytes(model: LoopedLanguageModel, characters: Tensor, num_steps: int) -> tuple[int, int]:
    """Of keys and values of characters (B, l): at the fixed point, and at each of so many steps."""
    caches = EquilibriumCache(characters.shape[1]), StepCache(characters.shape[1], num_steps)
    for cache in caches:
        model(characters, cache, Stopping.steps(num_steps - 1))
    return caches[0].num_bytes, caches[1].num_bytes


def draw(alike: dict[int, float], needed: dict[float, tuple[float, float]], path: Path) -> None:
    """Losses by evaluations, and losses with evaluations a character by threshold."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(list(alike), list(alike.values()), "o-")
    left.set_xscale("log", base=2)
    left.set_xticks([2**i for i in range(6)], [str(2**i) for i in range(6)])
    left.set(xlabel="evaluations of the block", ylabel="held-out loss, nats a character")
    right.plot(list(alike), list(alike.values()), "o-", label="as many for all")
    losses, evaluations = zip(*needed.values(), strict=True)
    right.plot(evaluations, losses, "o-", label="as each needs, by its KL")
    for threshold, (loss, count) in needed.items():
        right.annotate(
            f"{threshold:g}", (count, loss), (-5, -6), textcoords="offset points", ha="right", fontsize=7
        )
    right.set(xlabel="evaluations a character", xlim=(1.5, 8.5), ylim=(None, max(losses) + 0.03))
    right.legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes/looped_language_model"))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    width, num_heads, num_steps, batch, context = (
        (16, 2, 20, 4, 24) if arguments.quick else (96, 4, 700, 12, 128)
    )
    num_windows, num_characters = (4, 8) if arguments.quick else (32, 48)
    torch.manual_seed(0)
    train_text, held_out, alphabet = corpus()
    model = LoopedLanguageModel(len(alphabet), width, num_heads)
    train(model, train_text, num_steps, batch, context)

    windows = held_out.unfold(0, context + 1, context)
    windows = windows[:: len(windows) // num_windows][:num_windows]
    alike = {number: loss_of_all_alike(model, windows, number) for number in EVALUATIONS}
    print("evaluations of the block" + "".join(f"{number:>8}" for number in alike))
    print("held-out loss           " + "".join(f"{loss:>8.3f}" for loss in alike.values()))
    needed = {threshold: loss_of_each_as_needed(model, windows, threshold) for threshold in THRESHOLDS}
    print("\na character leaves at a KL of   evaluations a character   held-out loss")
    for threshold, (loss, count) in needed.items():
        print(f"{threshold:>29} {count:>25.2f} {loss:>15.3f}")

    start = torch.stack([numbers(text, alphabet) for text in STARTS])
    lines, texts = compare_texts(model, start, num_characters)
    at_fixed_point, at_each_step = cache_bytes(model, windows[:1, 1:], 8)
    lines.append(
        f"keys and values of {context} characters: {at_fixed_point} bytes, of 8 steps {at_each_step}"
    )
    print("", *lines, "", *("".join(alphabet[c] for c in text) for text in texts), sep="\n")
    draw(alike, needed, arguments.out / "looped_language_model.png")


if __name__ == "__main__":
    main()
