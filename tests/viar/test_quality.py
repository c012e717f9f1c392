"""All figures of a set of images: each as its own file defines it, and beside that of real pictures."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from viar.data import ImageData, TensorImages
from viar.evaluation import (
    JUDGE,
    Classifier,
    Features,
    Moments,
    Reference,
    data_reference,
    evaluate_images,
    extractor_network,
    frechet_distance,
    inception_network,
    inception_score,
    judge,
    judge_network,
    kernel_distance,
    memorisation,
    precision_recall,
    with_held_out,
)
from viar.evaluation.quality import Seen

SMALL = replace(JUDGE, width=4, steps=4)


def stripes(count: int, seed: int) -> TensorImages:
    """Pictures of 8 bits of two classes."""
    labels = torch.arange(count) % 2
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 0.5
    images[labels == 0, :, ::2] += 0.5
    images[labels == 1, :, :, ::2] += 0.5
    return TensorImages(images.mul(255).round().div(255).mul(2).sub(1), labels)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData(stripes(60, 0), stripes(20, 1), 2, ("rows", "columns"))


@pytest.fixture(scope="module")
def classifier(data: ImageData) -> Classifier:
    return judge(data, recipe=replace(SMALL, steps=20))


def images_like(data: TensorImages) -> Tensor:
    return data.images.add(1).div(2)


def test_every_figure_is_that_of_its_own_definition(data: ImageData, classifier: Classifier) -> None:
    reference = data_reference(data, classifier)
    images, labels = stripes(30, 7).images, torch.arange(30) % 2
    made = evaluate_images((images.add(1).div(2)).split(7), labels, reference).generated
    with torch.no_grad():
        network = judge_network(classifier)
        real, seen = network.see(data.train.images), network.see(images)  # type: ignore[attr-defined]
        hits = classifier(images).argmax(1) == labels
        assert seen.pooled.equal(classifier.embed(images))
    assert seen.spatial is not None
    assert real.spatial is not None
    assert seen.probabilities is not None
    pixels = (images, data.train.images, data.validation.images)  # type: ignore[attr-defined]
    expected = {
        "num_images": 30,
        "fid": frechet_distance(Moments.of(seen.pooled), Moments.of(real.pooled)),
        "sfid": frechet_distance(Moments.of(seen.spatial), Moments.of(real.spatial)),
        "kid": kernel_distance(seen.pooled, real.pooled),
        **dict(zip(("precision", "recall"), precision_recall(real.pooled, seen.pooled), strict=True)),
        "inception_score": inception_score(seen.probabilities),
        "class_consistency": float(hits.float().mean()),
        "memorisation": memorisation(*pixels),
    }
    assert asdict(made) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_held_out_pictures_stand_beside_in_equal_numbers(data: ImageData, classifier: Classifier) -> None:
    reference = data_reference(data, classifier)
    real = data.validation
    for count, matched in ((50, 20), (20, 20), (12, 12)):
        made = stripes(count, 3)
        evaluation = evaluate_images(images_like(made), made.labels, reference)
        assert evaluation.real is not None
        assert evaluation.generated.num_images == count
        assert evaluation.matched.num_images == evaluation.real.num_images == matched
    assert isinstance(real, TensorImages)
    itself = evaluate_images(images_like(real), real.labels, reference)
    assert itself.ratios() == pytest.approx(dict.fromkeys(itself.ratios(), 1.0))
    assert {"fid", "precision", "memorisation"} <= set(itself.ratios())


@pytest.mark.parametrize("labels", [torch.arange(1000) % 10, torch.arange(1000) // 100])
def test_some_of_the_images_hold_all_classes_in_whatever_order_they_stand(labels: Tensor) -> None:
    """In turn or one after the other: no class has far more or fewer than its share of 50."""
    seen = Seen(Features(labels.float()[:, None]), None, labels.float())
    some = seen.some(500)
    counts = some.features.pooled.flatten().long().bincount(minlength=10)
    assert (int(counts.sum()), len(some.features.pooled)) == (500, 500)
    assert counts.min() > 25
    assert counts.max() < 75
    assert seen.some(500).features.pooled.equal(some.features.pooled)
    assert seen.some(1000).features.pooled.equal(seen.features.pooled)


def test_training_pictures_themselves_are_seen_to_be_copies(data: ImageData, classifier: Classifier) -> None:
    train = data.train
    assert isinstance(train, TensorImages)
    evaluation = evaluate_images(images_like(train), train.labels, data_reference(data, classifier))
    assert evaluation.generated.fid == pytest.approx(0, abs=1e-6)
    assert evaluation.generated.memorisation == pytest.approx(0, abs=1e-4)
    assert evaluation.generated.precision == 1


def test_figures_that_few_images_do_not_allow_are_none(data: ImageData, classifier: Classifier) -> None:
    reference = data_reference(data, classifier)
    for count, missing in ((1, {"fid", "sfid", "kid", "precision", "recall"}), (3, {"precision", "recall"})):
        made = stripes(count, 3)
        quality = evaluate_images(images_like(made), made.labels, reference).generated
        assert {name for name, value in asdict(quality).items() if value is None} == missing


def test_an_extractor_of_ones_own_has_its_figures_alone(data: ImageData) -> None:
    network = extractor_network(lambda images: images.mean((2, 3)), "means")
    seen = network.see(data.train.images)  # type: ignore[attr-defined]
    quality = evaluate_images(torch.rand(9, 3, 8, 8), None, Reference.of("mine", network, seen)).generated
    missing = {name for name, value in asdict(quality).items() if value is None}
    assert missing == {"sfid", "inception_score", "class_consistency", "memorisation"}


def test_labels_and_images_that_do_not_fit_are_refused(data: ImageData, classifier: Classifier) -> None:
    reference = data_reference(data, classifier)
    with pytest.raises(ValueError, match="labels: expected one an image, got 2"):
        evaluate_images(torch.rand(3, 3, 8, 8), torch.zeros(2), reference)
    with pytest.raises(ValueError, match="images: expected at least one, each with its label if any, got 3"):
        evaluate_images(torch.rand(3, 3, 8, 8), torch.zeros(5), reference)
    with pytest.raises(ValueError, match="images: expected at least one"):
        evaluate_images([], None, reference)
    nothing = replace(data, validation=TensorImages(torch.zeros(0, 3, 8, 8), torch.zeros(0)))
    with pytest.raises(ValueError, match="data: expected held-out images, got none"):
        with_held_out(reference, nothing, classifier)


# The judge


def test_a_judge_is_trained_once_for_a_recipe_and_data(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_rng_state()
    first = judge(data, cache=tmp_path / "judges", recipe=SMALL)
    assert torch.get_rng_state().equal(before)
    assert not first.training
    others = [judge(data, cache=tmp_path / "judges", recipe=replace(SMALL, seed=1))]
    others.append(judge(replace(data, train=stripes(40, 5)), cache=tmp_path / "judges", recipe=SMALL))
    others.append(judge(replace(data, validation=stripes(20, 6)), cache=tmp_path / "judges", recipe=SMALL))
    assert len(list((tmp_path / "judges").iterdir())) == 4
    names = {judge_network(one).name for one in (first, *others[:2])}
    assert len(names) == 3
    monkeypatch.setattr("viar.evaluation.judging.train_classifier", None)  # would fail if it was called
    again = judge(data, cache=tmp_path / "judges", recipe=SMALL)
    assert judge_network(again).name == judge_network(first).name
    assert all(a.equal(b) for a, b in zip(again.parameters(), first.parameters(), strict=True))


# Inception


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(9 * 4.0).view(1, 9, 2, 2).expand(len(x), -1, -1, -1)


class _FakeInception(nn.Module):
    """Shaped as torch-fidelity's: a branch that is hooked, pooled features and logits of 8-bit pixels."""

    def __init__(self, name: str, features: list[str], weights: str) -> None:
        super().__init__()
        assert features == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = _Branch()
        self.fc = nn.Linear(3, 4)
        self.load_state_dict(torch.load(weights))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert pixels.dtype == torch.uint8
        self.Mixed_6d.branch1x1(pixels)
        pooled = pixels.float().mean((2, 3))
        return pooled, pooled @ self.fc.weight.T


def test_inception_gives_what_the_published_programs_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake: Any = SimpleNamespace(FeatureExtractorInceptionV3=_FakeInception)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fake)
    torch.save({"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)}, tmp_path / "weights.pth")
    network = inception_network(tmp_path / "weights.pth")
    assert network.name.startswith("inception ")
    seen = network.see(torch.full((2, 3, 5, 5), 0.5))
    assert seen.pooled.tolist() == [[191.0] * 3] * 2  # (0.5 + 1) * 127.5 = 191.25
    assert seen.spatial is not None
    # Seven of nine channels, place before channel.
    assert seen.spatial[0].view(2, 2, 7)[0, 1].tolist() == [1.0, 5.0, 9.0, 13.0, 17.0, 21.0, 25.0]
    assert seen.probabilities is not None
    torch.testing.assert_close(seen.probabilities.sum(1), torch.ones(2))
    with pytest.raises(ValueError, match=r"features: no weights of Inception at .*nowhere"):
        inception_network(tmp_path / "nowhere")
    (tmp_path / "wrong.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"wrong.pth holds no weights of Inception"):
        inception_network(tmp_path / "wrong.pth")


def test_features_of_batches_are_joined_and_chosen_by_row() -> None:
    parts = [Features(torch.full((n, 2), float(n)), None, torch.ones(n, 1)) for n in (1, 2)]
    joined = Features.joined(parts)
    assert joined.pooled[:, 0].tolist() == [1, 2, 2]
    assert joined.spatial is None
    assert joined.rows(torch.tensor([2, 0])).pooled[:, 0].tolist() == [2, 1]
