"""All figures of a set of images against real ones, beside those of held-out pictures.

A figure of generated images says little by itself: it depends on the network, on the reference, and on how
many images there are, for few images of the same kind are far apart too. So each stands beside the same
figure of as many held-out pictures, and the ratio of both is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from ..data import Batch, BatchedDataset, ImageData, TensorImages, all_batches
from ..kinds import check_tensor, checked
from .classifier import Classifier
from .copies import median_ratio, nearest_distances
from .features import FeatureNetwork, Features, features_of, judge_network, of_8_bits
from .moments import Moments, frechet_distance
from .scores import inception_score, kernel_distance, precision_recall

NEIGHBOURS = 3  # of precision and recall, as published
BATCH = 100  # images looked at together
SEED = 0  # of which images are matched with held-out pictures


@dataclass(frozen=True)
class Quality:
    """Figures of a set of images; `None` where the reference, the network or the number allow none.

    Attributes:
        num_images: N.
        fid: Fréchet distance of features to the reference; of two images at least.
        sfid: that of features with their place.
        kid: kernel distance to the reference.
        precision: share of the images that are among the reference's; of four images at least.
        recall: share of the reference's that are among the images.
        inception_score: 1 to the number of classes.
        class_consistency: share of the images in which the judge sees the class that was asked for.
        memorisation: median distance to the nearest training picture over that of held-out pictures.
    """

    num_images: int
    fid: float | None = None
    sfid: float | None = None
    kid: float | None = None
    precision: float | None = None
    recall: float | None = None
    inception_score: float | None = None
    class_consistency: float | None = None
    memorisation: float | None = None


@dataclass(frozen=True)
class Seen:
    """What was seen in N images in one pass over them.

    Attributes:
        features: of the reference's network.
        hits: (N,) bool, whether the judge sees the class that was asked for; `None` without judge or classes.
        nearest: (N,) distance to the nearest training picture; `None` without training pictures.
    """

    features: Features
    hits: Tensor | None
    nearest: Tensor | None

    def some(self, num: int) -> Seen:
        """`num` of the images, drawn at random as they may have classes in turn, and always the same ones."""
        generator = torch.Generator().manual_seed(SEED)
        rows = torch.randperm(len(self.features.pooled), generator=generator)[:num].sort().values
        hits, nearest = (None if value is None else value[rows] for value in (self.hits, self.nearest))
        return Seen(self.features.rows(rows), hits, nearest)


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    Attributes:
        name: for people.
        network: whose features are compared.
        moments: of the features of real images.
        spatial: of those with their place, if there are any.
        pooled: (M, F) features of single real images, for kernel distance, precision and recall.
        judge: of the classes, in evaluation mode; default none.
        training: (M, 3, H, W) in [-1, 1], pictures that a model may have learnt by heart; default none.
        held_out: what was seen in pictures that neither model nor reference have; default none.
    """

    name: str
    network: FeatureNetwork
    moments: Moments
    spatial: Moments | None = None
    pooled: Tensor | None = None
    judge: nn.Module | None = None
    training: Tensor | None = None
    held_out: Seen | None = None

    @classmethod
    def of(cls, name: str, network: FeatureNetwork, features: Features) -> Reference:
        """One of the features of its images.

        Args:
            name: for people.
            network: that has seen them.
            features: of real images (M, 3, H, W), M at least 2.
        """
        spatial = None if features.spatial is None else Moments.of(features.spatial)
        return cls(name, network, Moments.of(features.pooled), spatial, features.pooled)

    def see(self, images: Iterable[Tensor], labels: Tensor | None = None) -> Seen:
        """What there is to see in images, whose pixels are brought to 8 bits as files have them.

        Args:
            images: batches (B, 3, H, W) in [0, 1].
            labels: (N,) class of each image; default none are told.

        Raises:
            ValueError: no images, or another number of labels.
        """
        if labels is not None:
            check_tensor("labels", labels, has_numbers=True)
            if labels.ndim != 1:
                raise ValueError(f"labels: expected shape (N,), got {tuple(labels.shape)}")
        features, count = list[Features](), 0
        hits, nearest = list[Tensor](), list[Tensor]()
        with torch.no_grad():
            for batch in map(of_8_bits, images):
                features.append(self.network.see(batch))
                if self.judge is not None and labels is not None:
                    device = next(self.judge.parameters()).device
                    classes = self.judge(batch.to(device)).argmax(1).cpu()
                    hits.append(classes == _labels_of(labels, count, len(batch)))
                if self.training is not None:
                    nearest.append(nearest_distances(batch, self.training).cpu())
                count += len(batch)
        if not count or (labels is not None and len(labels) != count):
            told = "" if labels is None else f", with {len(labels)} labels"
            raise ValueError(f"images: expected at least one, each with its label if any, got {count}{told}")
        hit, near = (torch.cat(parts) if parts else None for parts in (hits, nearest))
        return Seen(Features.joined(features), hit, near)

    def quality(self, seen: Seen) -> Quality:
        """Figures of images.

        Args:
            seen: what `see` saw in them.
        """
        features, few = seen.features, len(seen.features.pooled)
        quality = Quality(
            few,
            inception_score=_of(features.probabilities, inception_score),
            class_consistency=_of(seen.hits, lambda hits: float(hits.float().mean())),
            memorisation=_memorisation(seen, self.held_out),
        )
        if few < 2:
            return quality
        quality = replace(quality, fid=frechet_distance(Moments.of(features.pooled), self.moments))
        if features.spatial is not None and self.spatial is not None:
            quality = replace(quality, sfid=frechet_distance(Moments.of(features.spatial), self.spatial))
        if self.pooled is not None:
            quality = replace(quality, kid=kernel_distance(features.pooled, self.pooled))
            if min(few, len(self.pooled)) > NEIGHBOURS:
                precision, recall = precision_recall(self.pooled, features.pooled, NEIGHBOURS)
                quality = replace(quality, precision=precision, recall=recall)
        return quality


@dataclass(frozen=True)
class Evaluation:
    """Figures of images, and what they would be if the images were real.

    Attributes:
        generated: of all images.
        matched: of as many of them as there are held-out pictures, if there are more; drawn at random.
        real: of held-out pictures, as many as are matched, against the same reference; `None` without any.
    """

    generated: Quality
    matched: Quality
    real: Quality | None

    def ratios(self) -> dict[str, float]:
        """Figures of `matched` over those of `real`, where there are both and the latter is above 0."""
        real = {} if self.real is None else asdict(self.real)
        matched = asdict(self.matched)
        return {
            name: matched[name] / real[name]
            for name in matched
            if name != "num_images" and matched[name] is not None and (real.get(name) or 0) > 0
        }


@checked
def evaluate_images(
    images: Tensor | Iterable[Tensor],
    labels: Tensor | None,
    reference: Reference,
) -> Evaluation:
    """Figures of images against a reference, beside those of its held-out pictures.

    Images are looked at a batch at a time, and what is seen of all of them is kept: at most 20 kB an image.

    Args:
        images: (N, 3, H, W) in [0, 1] as `viar.generate` gives them, or batches of such; N at least 1.
        labels: (N,) classes that were asked for, or `None`.
        reference: what to compare with.

    Raises:
        ValueError: no images, or another number of labels.
    """
    if isinstance(images, Tensor):
        check_tensor("images", images, has_numbers=True)
    if isinstance(images, Tensor) and images.ndim != 4:
        raise ValueError(f"images: expected shape (N, 3, H, W), got {tuple(images.shape)}")
    seen = reference.see(torch.split(images, BATCH) if isinstance(images, Tensor) else images, labels)
    generated = reference.quality(seen)
    held_out = reference.held_out
    if held_out is None:
        return Evaluation(generated, generated, None)
    num = min(generated.num_images, len(held_out.features.pooled))
    matched = generated if num == generated.num_images else reference.quality(seen.some(num))
    return Evaluation(generated, matched, reference.quality(held_out.some(num)))


@checked
def data_reference(
    data: ImageData,
    judge: Classifier,
    network: FeatureNetwork | None = None,
    *,
    name: str = "training pictures",
) -> Reference:
    """Training pictures of a data set as the reference, its held-out ones beside them.

    Args:
        data: real images, loaded with `augmentations=()`, so that none is changed when it is drawn.
        judge: of its classes, in evaluation mode.
        network: to compare features of; default the judge's.
        name: for people.

    Raises:
        ValueError: nothing is held out.
    """
    network = network or judge_network(judge)
    return with_held_out(
        Reference.of(name, network, features_of(network, images_of(data.train))), data, judge
    )


@checked
def with_held_out(reference: Reference, data: ImageData, judge: Classifier) -> Reference:
    """The same reference, with a judge and held-out pictures to compare with.

    Training pictures are among it where they are held in memory, and are not changed whenever they are drawn.

    Args:
        reference: of any real images.
        data: that the images are to be like, with pictures held out.
        judge: of its classes, in evaluation mode.

    Raises:
        ValueError: nothing is held out.
    """
    if not len(data.validation):
        raise ValueError("data: expected held-out images, got none; give two pictures of a class")
    training = data.train.images if isinstance(data.train, TensorImages) else None
    reference = replace(reference, judge=judge, training=training)
    labels = torch.cat([labels for _, labels in all_batches(data.validation, BATCH)])
    return replace(reference, held_out=reference.see(images_of(data.validation), labels))


def images_of(data: BatchedDataset[Batch]) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) in [0, 1] of real images, in order.

    Args:
        data: images in [-1, 1].
    """
    return (images.add(1).div(2) for images, _ in all_batches(data, BATCH))


def _labels_of(labels: Tensor, start: int, count: int) -> Tensor:
    """Some of the labels, as many as there are images to have them."""
    some = labels[start : start + count].cpu()
    if len(some) < count:
        raise ValueError(f"labels: expected one an image, got {len(labels)} for {start + count} and more")
    return some


def _memorisation(seen: Seen, held_out: Seen | None) -> float | None:
    if seen.nearest is None or held_out is None or held_out.nearest is None:
        return None
    # Where training has most of the held-out pictures too, there is nothing to tell.
    return median_ratio(seen.nearest, held_out.nearest) if held_out.nearest.median() > 0 else None


def _of(value: Tensor | None, figure: Callable[[Tensor], float]) -> float | None:
    return None if value is None else figure(value)
