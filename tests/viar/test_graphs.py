"""Generation by CUDA graphs: on a GPU by CUDA's, on a CPU by tapes, which are as strict; see `taped`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import logging
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from taped import Tape, TapeDevice, tensors, use_tapes
from tiny_models import tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import viar.generation.graphs
import viar.generation.sampling
import viar.model.graphs
from deqlib import record
from viar import (
    Adaptive,
    NextScaleTransformer,
    Sample,
    Sampling,
    Tokenizer,
    edit,
    generate,
    generate_series,
    prepare_inference,
    sample_tokens,
)
from viar.generation.choice import TokenNoise
from viar.generation.graphs import BATCHES, captured_batch
from viar.generation.scalewise import Generation

pytestmark = pytest.mark.gpu

DEVICE = torch.device(
    os.environ.get("DEQLIB_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
)
Pair = tuple[NextScaleTransformer, Tokenizer]
SAMPLINGS = {
    "plain": Sampling(),
    "few iterations": Sampling(iterations=(3, 1)),
    "iterates": Sampling(iterations=(3, 2), cache="iterate"),
    "warm start": Sampling(iterations=2, warm_start=True),
    "reused guidance": Sampling(guidance_reuse=1),
    "no guidance": Sampling(cfg=0, top_k=None),
    "most likely": Sampling(top_k=1),
    "mixtures": Sampling(more_smooth=True, top_p=None),
}
EXPLICIT = ("plain", "reused guidance", "no guidance", "most likely", "mixtures")
KINDS = [("implicit", name) for name in SAMPLINGS] + [("explicit", name) for name in EXPLICIT]


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What captures were made on, in the order they came."""
    if DEVICE.type == "cpu":
        return use_tapes(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    made: list[Any] = []

    class Counted(viar.model.graphs.Device):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(self)

    monkeypatch.setattr(viar.model.graphs, "Device", Counted)
    return made


SIDES = (1, 3)


def models(kind: str = "implicit", *, graphs: bool = True, sides: tuple[int, ...] = SIDES) -> Pair:
    model, tokenizer = tiny_transformer(kind, sides=sides).to(DEVICE), tiny_tokenizer(sides=sides).to(DEVICE)
    prepare_inference(model, tokenizer, graphs=graphs)
    return model, tokenizer


def graphs_of(model: NextScaleTransformer) -> viar.model.graphs.Graphs:
    assert model.graphs is not None
    return model.graphs


def eager(pair: Pair, labels: list[int], sampling: Sampling, first_index: int = 0) -> Sample:
    """The same without graphs."""
    model, tokenizer = pair
    held, model.graphs = model.graphs, None
    try:
        return sample_tokens(model, tokenizer, labels, sampling, first_index=first_index)
    finally:
        model.graphs = held


def check_same(actual: Sample, expected: Sample, *, soft: bool = False, tolerance: float = 1e-4) -> None:
    """The same images, where no choice hangs on the rounding of another batch."""
    assert [t.shape for t in actual.tokens] == [t.shape for t in expected.tokens]
    assert actual.certain.equal(expected.certain)
    sure = torch.ones_like(expected.certain) if soft else expected.certain
    assert sure.float().mean() > 0.5 or len(sure) < 4  # else this says nothing
    for one, other in zip(actual.tokens, expected.tokens, strict=True):
        assert one[sure].equal(other[sure])
    torch.testing.assert_close(actual.f_hat[sure], expected.f_hat[sure], atol=tolerance, rtol=tolerance)


def check(pair: Pair, labels: list[int], sampling: Sampling | None = None, first_index: int = 0) -> None:
    sampling = sampling or Sampling()
    actual = sample_tokens(*pair, labels, sampling, first_index=first_index)
    check_same(actual, eager(pair, labels, sampling, first_index), soft=sampling.more_smooth)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_one_capture_serves_all_labels_and_seeds(kind: str, name: str) -> None:
    pair = models(kind, sides=(1, 2, 3))
    for number, labels in enumerate(([0, 1, 2, 3, 0], [3, 3, 2, 1, 1], [1, 0, 0, 2, 2])):
        check(pair, labels, dataclasses.replace(SAMPLINGS[name], seed=number), first_index=7 * number)
        assert graphs_of(pair[0]).num_captures == 1


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(1, 7),
            st.sampled_from(["plain", "few iterations", "mixtures"]),
            st.integers(0, 2**62),
            st.booleans(),
        ),
        min_size=2,
        max_size=6,
    )
)
def test_whatever_is_generated_in_turn_is_what_it_is_without_graphs(
    wanted: list[tuple[int, str, int, bool]],
) -> None:
    pair = models()
    for num_images, name, seed, changes_weights in wanted:
        if changes_weights:
            with torch.no_grad():
                pair[0].trunk.pre[0].fc1.weight.mul_(1.05)  # type: ignore[index, union-attr, operator]
        check(pair, [i % 4 for i in range(num_images)], dataclasses.replace(SAMPLINGS[name], seed=seed))
    keys = {(captured_batch(num_images), name) for num_images, name, _, _ in wanted}
    assert graphs_of(pair[0]).num_captures == len(keys)


def test_batches_up_to_the_largest_size_are_filled_up_and_larger_ones_are_not() -> None:
    assert [captured_batch(n) for n in (0, 1, 2, 3, 4, 5, 7, 9, 13, 16, 17, 25, 100)] == [
        1, 1, 2, 3, 4, 6, 8, 12, 16, 16, 17, 25, 100,
    ]  # fmt: skip
    assert all(size <= 1.5 * n for n in range(1, 17) for size in [captured_batch(n)])
    pair = models()
    for num_images, num_captures in ((5, 1), (6, 1), (4, 2), (max(BATCHES) + 1, 3), (5, 3)):
        check(pair, [0] * num_images)
        assert graphs_of(pair[0]).num_captures == num_captures
    no_labels = torch.zeros(0, dtype=torch.int64)
    assert [t.shape for t in sample_tokens(*pair, no_labels).tokens] == [(0, 1), (0, 9)]


def test_weights_changed_in_place_are_seen_by_replays(devices: list[Any]) -> None:
    pair = models()
    before = sample_tokens(*pair, [0, 1, 2])
    with torch.no_grad():
        for parameter in [*pair[0].parameters(), *pair[1].quantizer.parameters()]:
            parameter.mul_(1.2)
    check(pair, [0, 1, 2])
    assert len(devices) == graphs_of(pair[0]).num_captures == 1
    assert not sample_tokens(*pair, [0, 1, 2]).f_hat.equal(before.f_hat)


def assign_state(model: NextScaleTransformer) -> None:
    other = tiny_transformer(seed=1, sides=SIDES).to(DEVICE)
    model.load_state_dict(other.state_dict(), assign=True)


def load_state(model: NextScaleTransformer) -> None:
    model.load_state_dict(tiny_transformer(seed=1, sides=SIDES).state_dict())


def change_type(model: NextScaleTransformer) -> None:
    model.double()


def new_parameter(model: NextScaleTransformer) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)


def other_values(model: NextScaleTransformer) -> None:
    model.head.weight.data = model.head.weight.data * 2


REPLACING = (assign_state, load_state, change_type, new_parameter, other_values)


@pytest.mark.parametrize("replacing", REPLACING)
def test_weights_that_are_replaced_are_captured_anew(
    replacing: Callable[[NextScaleTransformer], None], devices: list[Any]
) -> None:
    pair = models()
    for _ in range(2):
        check(pair, [0, 1, 2])
    check(pair, [0])
    replacing(pair[0])
    for _ in range(2):
        check(pair, [0, 1, 2])
    assert len(devices) == 2
    assert graphs_of(pair[0]).num_captures == 1  # nothing of the old weights is left


class Samples(nn.Module):
    """Sampling as a module, whose weights can be lent."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.model, self.tokenizer = pair

    def forward(self) -> Sample:
        return sample_tokens(self.model, self.tokenizer, [0, 1, 2])


def test_weights_that_a_functional_call_lends_are_not_mixed_up() -> None:
    model, tokenizer = models()
    other = tiny_transformer(seed=1, sides=SIDES).to(DEVICE)
    own, lent = (eager((m, tokenizer), [0, 1, 2], Sampling()) for m in (model, other))
    weights = {f"model.{name}": value for name, value in other.named_parameters()}
    for _ in range(2):
        check_same(functional_call(Samples((model, tokenizer)), weights, ()), lent)
        check_same(sample_tokens(model, tokenizer, [0, 1, 2]), own)


def test_two_tokenizers_of_a_model_are_not_mixed_up(devices: list[Any]) -> None:
    model, first = models()
    second = tiny_tokenizer(seed=5, sides=SIDES).to(DEVICE)
    for tokenizer in (first, second, first, second):
        check((model, tokenizer), [0, 1, 2])
    assert (len(devices), graphs_of(model).num_captures) == (1, 2)


def test_every_setting_but_seed_has_a_capture_of_its_own() -> None:
    pair = models()
    for sampling in SAMPLINGS.values():
        sample_tokens(*pair, [0], sampling)
    assert graphs_of(pair[0]).num_captures == len(SAMPLINGS)
    sample_tokens(*pair, [0], Sampling(iterations=[3, 1]))  # (3, 1) spelled out
    assert graphs_of(pair[0]).num_captures == len(SAMPLINGS)


def test_settings_of_the_process_that_choose_kernels_have_captures_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = models()
    for name, value in (("allow_tf32", False), ("deterministic", True), ("allow_tf32", True)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
        sample_tokens(*pair, [0])
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_accumulation = True  # which monkeypatch would put back as an attribute
    try:
        sample_tokens(*pair, [0])
    finally:
        matmul.allow_fp16_accumulation = False
    monkeypatch.undo()
    assert graphs_of(pair[0]).num_captures == 4


def test_parts_that_are_in_training_mode_have_captures_of_their_own() -> None:
    pair = models("explicit")
    check(pair, [0, 1])
    pair[0].trunk.train()
    check(pair, [0, 1])
    assert graphs_of(pair[0]).num_captures == 2
    block = pair[0].trunk.blocks[1]  # type: ignore[index, union-attr]
    block.drop_path.rate = 1.0  # type: ignore[union-attr]
    block.eval()  # type: ignore[union-attr, operator]
    check(pair, [0, 1])
    pair[0].eval()
    check(pair, [0, 1])
    assert graphs_of(pair[0]).num_captures == 3


def test_autocast_is_part_of_a_capture_and_keeps_no_weight_there() -> None:
    pair, images = models(), []
    check(pair, [0, 1])
    for _ in range(2):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            images.append(sample_tokens(*pair, [0, 1], Sampling(top_k=1)).f_hat)
            expected = eager(pair, [0, 1], Sampling(top_k=1)).f_hat
            torch.testing.assert_close(images[-1], expected, atol=0.05, rtol=0.05)
        with torch.no_grad():
            for parameter in pair[0].parameters():
                parameter.mul_(-1.5)
    assert (images[0] - images[1]).abs().max() > 0.1
    check(pair, [0, 1])
    assert graphs_of(pair[0]).num_captures == 2


def test_inference_mode_may_come_and_go() -> None:
    pair = models()
    with torch.inference_mode():
        check(pair, [0, 1, 2])
    check(pair, [2, 1, 0])
    with torch.inference_mode():
        check(pair, [1, 1, 0])
    with torch.enable_grad():
        assert not sample_tokens(*pair, [1, 1, 0]).f_hat.requires_grad


def test_lower_precision_is_captured() -> None:
    model, tokenizer = models()
    prepare_inference(model, tokenizer, dtype=torch.bfloat16, graphs=True)
    expected = eager((model, tokenizer), [0, 1, 2], Sampling())
    for _ in range(2):
        actual = sample_tokens(model, tokenizer, [0, 1, 2])
        torch.testing.assert_close(actual.f_hat, expected.f_hat, atol=0.1, rtol=0.1)
    assert graphs_of(model).num_captures == 1


def test_what_was_returned_is_not_written_to_again() -> None:
    pair = models()
    first = sample_tokens(*pair, [0, 1, 2])
    kept = copy.deepcopy(first)
    for labels in ([2, 1, 0], [3, 3], [0]):
        sample_tokens(*pair, labels, Sampling(seed=3))
    assert first.f_hat.equal(kept.f_hat)
    assert first.certain.equal(kept.certain)
    assert all(one.equal(other) for one, other in zip(first.tokens, kept.tokens, strict=True))


def test_captures_that_were_not_used_for_longest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viar.model.graphs, "MOST_CAPTURES", 2)
    pair, made = models(), []
    original = viar.model.graphs._captured

    def counted(*args: Any) -> Any:
        made.append(args)
        return original(*args)

    monkeypatch.setattr(viar.model.graphs, "_captured", counted)
    for num_images, captured in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        check(pair, [0] * num_images)
        assert len(made) == captured
        assert graphs_of(pair[0]).num_captures <= 2


def test_threads_take_turns() -> None:
    pair = models()
    wanted = [([0, 1, 2], 0), ([3, 0], 1), ([2, 2, 2], 2), ([1], 3)]
    expected = [eager(pair, labels, Sampling(seed=seed)) for labels, seed in wanted]
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                labels, seed = wanted[number]
                check_same(sample_tokens(*pair, labels, Sampling(seed=seed)), expected[number])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_graphs_that_another_thread_takes_off_serve_what_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = models()
    expected = eager(pair, [0, 1, 2], Sampling())
    original = viar.generation.sampling.why_eager

    def interrupted(*args: Any, **kwargs: Any) -> str | None:
        prepare_inference(*pair)
        return original(*args, **kwargs)

    monkeypatch.setattr(viar.generation.sampling, "why_eager", interrupted)
    check_same(sample_tokens(*pair, [0, 1, 2]), expected)
    assert pair[0].graphs is None


def test_memory_is_told_shared_and_released() -> None:
    model, tokenizer = models()
    graphs = graphs_of(model)
    assert repr(graphs) == "Graphs(num_captures=0, num_bytes=0)"
    sample_tokens(model, tokenizer, [0, 1, 2])
    first = graphs.num_bytes
    assert first > 0
    sample_tokens(model, tokenizer, [2, 1, 0])
    assert graphs.num_bytes == first
    prepare_inference(model, tokenizer)
    assert model.graphs is None
    assert (graphs.num_captures, graphs.num_bytes) == (0, 0)


def test_copies_and_pickles_carry_no_graphs_and_capture_their_own(tmp_path: Path) -> None:
    model, tokenizer = models()
    expected, size = sample_tokens(model, tokenizer, [0, 1, 2]), len(pickle.dumps(models()[0]))
    assert "graphs" not in "".join(model.state_dict())
    assert abs(len(pickle.dumps(model)) - size) <= 8
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        if twin.graphs is not model.graphs:  # a shallow copy shares weights and graphs
            assert graphs_of(twin).num_captures == 0
        check_same(sample_tokens(twin, tokenizer, [0, 1, 2]), expected)
        with torch.no_grad():
            twin.head.weight.add_(0)
    model.save_pretrained(tmp_path)
    loaded = NextScaleTransformer.from_pretrained(tmp_path).to(DEVICE)
    assert loaded.graphs is None
    check_same(sample_tokens(loaded, tokenizer, [0, 1, 2]), expected)


def only(messages: list[str]) -> str:
    assert len(messages) == 1, messages
    return messages[0]


EAGER: dict[str, tuple[Callable[[Pair], object], str]] = {
    "adaptive": (lambda p: generate(*p, [0], iterations=Adaptive(rtol=0.1)), "adaptive iterations depend"),
    "report": (lambda p: generate(*p, [0], return_report=True), "a report waits"),
    "features": (lambda p: edit(*p, pictures(), torch.eye(6), [0]), "editing works on every scale"),
    "codes": (lambda p: edit(*p, pictures(), torch.eye(6), [0], keep="codes"), "editing works on"),
    "hooks": (lambda p: generate(hooked(p[0]), p[1], [0]), "hooks of modules would not be called"),
    "hooks of all modules": (lambda p: hooked_generation(*p), "hooks of modules would not be called"),
    "cached weights": (lambda p: cached_generation(*p), "weights that parametrize.cached() keeps would be"),
    "recording": (lambda p: recorded_generation(*p), "deqlib.record would see no solves in a replay"),
    "parts elsewhere": (lambda p: generate(*apart(p), [0]), "the weights are not all plain tensors"),
}


def pictures() -> Tensor:
    return uniform(1, 3, 6, 6).to(DEVICE)


def hooked_generation(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    called: list[object] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(None))
    try:
        generate(model, tokenizer, [0])
    finally:
        handle.remove()
    assert len(called) > len(SIDES) * 10


def cached_generation(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    if not parametrize.is_parametrized(model.head):
        parametrizations.weight_norm(model.head)
    with parametrize.cached():
        generate(model, tokenizer, [0])


def recorded_generation(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    with record() as solves:
        generate(model, tokenizer, [0])
    assert len(solves) == len(SIDES)


def hooked(model: NextScaleTransformer) -> NextScaleTransformer:
    model.trunk.register_forward_hook(lambda *_: None)
    return model


class Sharded(nn.Parameter):
    """Stands for a tensor of another class."""


def apart(pair: Pair) -> Pair:
    pair[0].head.bias = Sharded(pair[0].head.bias.detach())
    return pair


@pytest.mark.parametrize("name", EAGER)
def test_what_cannot_be_captured_says_why_once_and_runs_eagerly(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    call, reason = EAGER[name]
    pair = models()
    with caplog.at_level(logging.WARNING, "viar"):
        for _ in range(2):
            call(pair)
    told = only([r.getMessage() for r in caplog.records if r.name == "viar"])
    assert told.startswith(f"CUDA graphs: {reason}")
    assert told.endswith("; running without them")
    assert graphs_of(pair[0]).num_captures == 0


def test_a_model_on_another_device_says_that_graphs_are_of_cuda(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    expected = sample_tokens(model, tokenizer, [0, 1, 2])
    prepare_inference(model, tokenizer, graphs=True)
    with caplog.at_level(logging.WARNING, "viar"):
        assert sample_tokens(model, tokenizer, [0, 1, 2]).f_hat.equal(expected.f_hat)
        sample_tokens(model, tokenizer, [0])
    assert only([record.getMessage() for record in caplog.records]) == (
        "CUDA graphs: the model is on cpu, and graphs need a CUDA device; running without them"
    )


def test_a_backend_that_captures_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="graphs: compile='cudagraphs' captures the blocks by itself"):
        prepare_inference(tiny_transformer(), compile="cudagraphs", graphs=True)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="may leave a process without room for other captures")
def test_after_a_capture_that_fails_there_is_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = models()
    whole = Generation.run

    def waiting(self: Generation, scale: int, *hooks: Any) -> None:
        whole(self, scale, *hooks)
        if scale == 1:
            self.f_hat.sum().item()

    monkeypatch.setattr(Generation, "run", waiting)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        sample_tokens(*pair, [0, 1, 2])
    monkeypatch.setattr(Generation, "run", whole)
    assert graphs_of(pair[0]).num_captures == 0
    check(pair, [0, 1, 2])
    assert graphs_of(pair[0]).num_captures == 1


def made_series(pair: Pair, folder: Path, num: int, **given: Any) -> dict[str, bytes]:
    generate_series(*pair, folder, num, console=Console(file=io.StringIO()), **given)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_series_by_graphs_has_the_files_of_one_without(tmp_path: Path) -> None:
    expected = made_series(models(graphs=False), tmp_path / "eager", 10, batch_size=4)
    pair = models()
    assert made_series(pair, tmp_path / "graphs", 10, batch_size=4) == expected
    graphs = graphs_of(pair[0])
    assert 1 <= graphs.num_captures <= 2  # full batches, and images that are sampled again alone
    assert made_series(models(), tmp_path / "more", 7, batch_size=3).items() >= {
        (name, data) for name, data in expected.items() if name[:6] in [f"{i:06d}" for i in range(7)]
    }


def test_where_rounding_may_decide_graphs_are_a_setting_of_the_series(tmp_path: Path) -> None:
    sampling = Sampling(more_smooth=True)
    made_series(models(), tmp_path, 4, batch_size=2, sampling=sampling)
    assert json.loads((tmp_path / "series.json").read_text())["graphs"] is True
    with pytest.raises(ValueError, match="graphs: true there, null now"):
        made_series(models(graphs=False), tmp_path, 6, batch_size=2, sampling=sampling)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_replay_waits_for_nothing_and_takes_no_more_memory() -> None:
    pair = models()
    labels = torch.tensor([0, 1, 2])
    for _ in range(2):
        sample_tokens(*pair, labels)
    allocated, pool = torch.cuda.memory_allocated(), graphs_of(pair[0]).num_bytes
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(10):
            sample_tokens(*pair, labels, Sampling(seed=seed))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cuda.memory_allocated(), graphs_of(pair[0]).num_bytes) == (allocated, pool)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_streams_take_turns() -> None:
    pair = models()
    wanted = [([0, 1, 2], 0), ([3, 0, 1], 1), ([2, 2, 2], 2)]
    expected = [eager(pair, labels, Sampling(seed=seed)) for labels, seed in wanted]
    found: list[Sample] = []
    for labels, seed in wanted:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(sample_tokens(*pair, labels, Sampling(seed=seed)))
    torch.cuda.synchronize()
    for actual, other in zip(found, expected, strict=True):
        check_same(actual, other)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="tapes keep a compiler out")
def test_compiled_blocks_are_captured() -> None:
    model, tokenizer = models()
    expected = eager((model, tokenizer), [0, 1, 2], Sampling())
    prepare_inference(model, tokenizer, compile="aot_eager", graphs=True)
    for _ in range(2):
        check_same(sample_tokens(model, tokenizer, [0, 1, 2]), expected)
    assert graphs_of(model).num_captures == 1
    torch._dynamo.reset()


def on_fake_cuda(module: nn.Module) -> nn.Module:
    """The module with parameters that have no numbers, on a GPU that need not be there."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(parameter, device="cuda")))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty_like(buffer, device="cuda"))
    return module


class FromHost(TorchDispatchMode):
    """Notes every operation that meets a tensor of the host, but those that fill in one number."""

    fills = ("lift_fresh", "device", "fill_")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        hosts = [t for t in tensors((args, kwargs, out)) if t.device.type == "cpu"]
        if hosts and not (func.overloadpacket.__name__ in self.fills and all(t.dim() == 0 for t in hosts)):
            self.found.append(str(func))
        return out


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a build of PyTorch with CUDA")
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_a_scale_asks_for_nothing_that_a_gpu_would_be_waited_for(kind: str, name: str) -> None:
    pair = tiny_transformer(kind), tiny_tokenizer()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, tokenizer = (on_fake_cuda(module) for module in pair)
        assert isinstance(model, NextScaleTransformer)
        assert isinstance(tokenizer, Tokenizer)
        labels, keys = (torch.zeros(3, dtype=torch.int64, device="cuda") for _ in range(2))
        schedule = SAMPLINGS[name].schedule(model.trunk)
        with FromHost() as met:
            generation = Generation(model, tokenizer, SAMPLINGS[name], schedule, labels, TokenNoise(keys))
            for scale in range(len(model.config.sides)):
                generation.run(scale)
        assert generation.f_hat.device.type == "cuda"
        assert not met.found


# Whether the tapes are strict


def recorded(step: Callable[[], Tensor]) -> tuple[Tape, Tensor]:
    device = TapeDevice(torch.device("cpu"))
    tape, (result,) = device.capture(lambda: (step(),))
    return tape, result


@pytest.mark.skipif(DEVICE.type != "cpu", reason="no tapes on a GPU")
def test_a_tape_is_deaf_to_python_and_reads_the_memory_it_was_recorded_with() -> None:
    x, box = torch.ones(3), {"factor": 2.0}
    tape, y = recorded(lambda: (x * box["factor"]).add_(1))
    tape.replay()
    assert y.tolist() == [3, 3, 3]
    box["factor"] = 5
    x.add_(1)
    tape.replay()
    assert y.tolist() == [5, 5, 5]


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "a number that is read": lambda x: x.sum().item(),
    "a comparison of all": lambda x: x.equal(x + 1),
    "random numbers": torch.rand_like,
    "numbers of the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "a mask as index": lambda x: x[x > 0],
}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="no tapes on a GPU")
@pytest.mark.parametrize("name", REFUSED)
def test_a_tape_refuses_what_a_graph_cannot_hold(name: str) -> None:
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorded(functools.partial(REFUSED[name], torch.ones(3)))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="no tapes on a GPU")
def test_a_tape_loses_what_nobody_holds_between_its_steps() -> None:
    x, device, box = torch.ones(3), TapeDevice(torch.device("cpu")), {}

    def first() -> tuple[Tensor, ...]:
        box["kept"], dropped = x + 1, x + 2
        box["place"] = dropped.detach().data_ptr()
        return ()

    one, _ = device.capture(first)
    other, (y,) = device.capture(lambda: (box["kept"] * 2,))
    one.replay()
    other.replay()
    assert y.tolist() == [4, 4, 4]
    assert one.own[box["place"]].eq(0xFF).all()
    one.replay()
    assert y.isnan().all()
