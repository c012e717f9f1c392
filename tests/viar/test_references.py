"""What images are compared with: statistics and images in files, folders, data sets; what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from viar.data import save_picture
from viar.evaluation import (
    FeatureNetwork,
    Features,
    Reference,
    evaluate_images,
    features_of,
    find_pictures,
    read_reference,
    references,
    save_reference,
)
from viar.evaluation.references import check_reference


def see(images: Tensor) -> Features:
    """Means and spreads of channels; corners by place."""
    pooled = torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)
    return Features(pooled, images[:, :, 0, :2].flatten(1))


NETWORK, OTHER = FeatureNetwork("inception 1", see), FeatureNetwork("judge 2", see)


def pixels(count: int, seed: int = 0, side: int = 6) -> Tensor:
    """(N, H, H, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, side, side, 3), generator=generator, dtype=torch.uint8)


def images_of(values: Tensor) -> Tensor:
    return values.permute(0, 3, 1, 2).float() / 255


def write_folder(folder: Path, values: Tensor) -> None:
    folder.mkdir()
    for index, image in enumerate(images_of(values)):
        save_picture(image, folder / f"{index:06d}.png")


@pytest.fixture
def real() -> Reference:
    return Reference.of("real", NETWORK, features_of(NETWORK, [images_of(pixels(30))]))


def same(a: Reference, b: Reference) -> bool:
    pairs = [(a.moments.mean, b.moments.mean), (a.moments.covariance, b.moments.covariance)]
    if a.spatial is not None and b.spatial is not None:
        pairs.append((a.spatial.covariance, b.spatial.covariance))
    return all(torch.allclose(x, y, rtol=1e-6, atol=1e-7) for x, y in pairs)


def test_pictures_are_the_same_reference_in_a_folder_and_in_an_archive(
    real: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "BATCH", 7)
    write_folder(tmp_path / "pictures", pixels(30))
    np.savez(tmp_path / "plain.npz", arr_0=pixels(30).numpy())
    np.savez_compressed(tmp_path / "small.npz", arr_0=pixels(30).numpy(), arr_1=np.arange(30) % 3)
    for name in ("pictures", "plain.npz", "small.npz"):
        found = read_reference(str(tmp_path / name), NETWORK, 6)
        assert same(found, real)
        assert found.pooled is not None
        assert found.moments.count == 30
    labels = find_pictures(tmp_path / "small.npz").labels
    assert labels is not None
    assert labels.tolist() == [i % 3 for i in range(30)]
    assert find_pictures(tmp_path / "plain.npz").labels is None
    made = find_pictures(tmp_path / "pictures")
    assert (made.num, made.image_side) == (30, 6)
    assert torch.cat(list(made.batches())).equal(images_of(pixels(30)))


def test_the_training_pictures_of_a_data_set_are_a_reference() -> None:
    assert read_reference("digits", NETWORK, 8).moments.count == 1612


def test_statistics_that_were_written_are_read_again(real: Reference, tmp_path: Path) -> None:
    save_reference(real, tmp_path / "own.npz")
    again = read_reference(str(tmp_path / "own.npz"), NETWORK, 6)
    assert same(again, real)
    assert again.moments.count == 30
    made = images_of(pixels(12, seed=1))
    assert evaluate_images(made, None, again) == evaluate_images(made, None, real)


def test_statistics_of_others_serve_inception_alone(real: Reference, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"mu": real.moments.mean.numpy(), "sigma": real.moments.covariance.numpy()}
    np.savez(tmp_path / "ttur.npz", **arrays)
    assert real.spatial is not None
    arrays |= {"mu_s": real.spatial.mean.numpy(), "sigma_s": real.spatial.covariance.numpy()}
    np.savez(tmp_path / "adm.npz", **arrays, arr_0=pixels(9, seed=2).numpy())
    made = images_of(pixels(12, seed=1))
    expected = evaluate_images(made, None, real).generated
    ttur, adm = (read_reference(str(tmp_path / name), NETWORK, 6) for name in ("ttur.npz", "adm.npz"))
    of_ttur, of_adm = (evaluate_images(made, None, reference).generated for reference in (ttur, adm))
    assert (of_ttur.fid, of_adm.fid) == pytest.approx((expected.fid, expected.fid))
    assert (of_ttur.sfid, of_ttur.kid, of_ttur.precision) == (None, None, None)
    assert of_adm.sfid == pytest.approx(expected.sfid)
    # Single images are those of the archive, statistics those of the whole data set.
    assert of_adm.precision is not None
    assert adm.pooled is not None
    assert len(adm.pooled) == 9
    with pytest.raises(ValueError, match=r"ttur.npz has statistics of the network inception, images"):
        read_reference(str(tmp_path / "ttur.npz"), OTHER, 6)
    save_reference(real, tmp_path / "own.npz")
    with pytest.raises(ValueError, match=r"of the network inception 1, images are seen by judge 2; what two"):
        read_reference(str(tmp_path / "own.npz"), OTHER, 6)


def test_a_file_is_held_to_its_digest(real: Reference, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    save_reference(real, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for right in (digest, digest[:10].upper()):
        read_reference(str(path), NETWORK, 6, sha256=right)
    with pytest.raises(ValueError, match=f"sha256: .*own.npz is another file: expected 00ff, got {digest}"):
        read_reference(str(path), NETWORK, 6, sha256="00ff")
    with pytest.raises(ValueError, match="sha256: expected a file to have a digest, digits is none"):
        read_reference("digits", NETWORK, 8, sha256="00ff")


def test_a_picture_of_a_folder_that_cannot_be_read_is_named_and_not_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "series", pixels(5))
    (tmp_path / "series" / ".hidden.png").write_bytes(b"")
    assert find_pictures(tmp_path / "series").num == 5
    (tmp_path / "series" / "000003.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000003.png: an empty file .*; 1 of 5 pictures cannot be read"):
        find_pictures(tmp_path / "series")


def test_a_series_tells_the_classes_of_its_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path / "series", pixels(5))
    (tmp_path / "series" / "series.json").write_text(json.dumps({"labels": [4, 2, 7]}))
    (tmp_path / "series" / "000001.png").unlink()  # one that is not made yet
    labels = find_pictures(tmp_path / "series").labels
    assert labels is not None
    assert labels.tolist() == [4, 7, 4, 2]
    for picture in (tmp_path / "series").glob("*.png"):
        picture.unlink()
    np.savez(tmp_path / "series" / "samples_5x6x6x3.npz", arr_0=pixels(5).numpy(), arr_1=np.ones(5, int))
    found = find_pictures(tmp_path / "series")
    assert found.labels is not None
    assert (found.num, found.labels.tolist()) == (5, [1] * 5)


def spoiled(path: Path, field: int, value: int) -> None:
    """Put a value into a field of the heads of all members of an archive: 6 flags, 8 the way of packing."""
    content = bytearray(path.read_bytes())
    for head, moved in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        start = content.find(head)
        while start >= 0:
            content[start + field + moved] = value
            start = content.find(head, start + 4)
    path.write_bytes(content)


def flip(path: Path) -> None:
    """Spoil the first byte that is packed, after the head of the first member, its name and what follows."""
    content = bytearray(path.read_bytes())
    content[30 + sum(struct.unpack("<HH", content[26:30]))] = 255
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["statistics", "images"])
@pytest.mark.parametrize("damage", ["password", "unknown packing", "flipped"])
def test_an_archive_that_cannot_be_unpacked_is_refused_in_words(
    kind: str, damage: str, real: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "spoiled.npz"
    values = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "statistics": {"mu": values.normal(size=6), "sigma": values.normal(size=(60, 60))},
        "images": {"arr_0": pixels(40).numpy()},
    }[kind]
    np.savez_compressed(path, **arrays)
    if damage == "flipped":
        flip(path)
    else:
        spoiled(path, *{"password": (6, 1), "unknown packing": (8, 97)}[damage])
    with pytest.raises(ValueError, match=r"spoiled.npz is (no archive of|damaged)"):
        read_reference(str(path), NETWORK, 6)


def of_numbers(**arrays: Any) -> dict[str, Any]:
    return {"mu": np.zeros(6), "sigma": np.eye(6)} | arrays


NO_STATISTICS: dict[str, tuple[dict[str, Any], str]] = {
    "nan-mu": (of_numbers(mu=np.full(6, np.nan)), "mu and sigma are no statistics of images; mean: expected"),
    "inf-sigma": (of_numbers(sigma=np.full((6, 6), np.inf)), "covariance: expected finite"),
    "negative": (of_numbers(sigma=-np.eye(6)), "covariance: expected variances of at least 0"),
    "triangle": (of_numbers(sigma=np.triu(np.ones((6, 6)))), "covariance: expected a symmetric matrix"),
    "complex": (of_numbers(mu=np.zeros(6) + 1j), "expected mu of real numbers in a type of floats, got comp"),
    "words": (of_numbers(sigma=np.full((6, 6), "x")), "expected sigma of real numbers in a type of floats"),
    "no-sigma": ({"mu": np.zeros(6)}, "expected sigma of real numbers in a type of floats, got none"),
    "width": (of_numbers(mu=np.zeros(5), sigma=np.eye(5)), "expected mu of 6 features, as inception 1 sees"),
    "places": (of_numbers(mu_s=np.zeros(5), sigma_s=np.eye(5)), "expected mu_s of 6 features"),
    "pooled": (of_numbers(pooled=np.full((9, 6), "x")), "expected pooled of real numbers"),
    "pooled-nan": (of_numbers(pooled=np.full((9, 6), np.nan)), "expected pooled (M, F) of finite numbers"),
    "pooled-flat": (of_numbers(pooled=np.zeros(6)), "expected pooled (M, F) of finite numbers"),
    "pooled-width": (of_numbers(pooled=np.zeros((9, 5))), "expected pooled of 6 features"),
    "counts": (of_numbers(count=np.array([1, 2])), "expected count, one integer of at least 2"),
    "count": (of_numbers(count=np.array(1)), "expected count, one integer of at least 2"),
}


@pytest.mark.parametrize("name", NO_STATISTICS)
def test_statistics_that_no_images_have_are_refused_before_any_is_made(name: str, tmp_path: Path) -> None:
    arrays, words = NO_STATISTICS[name]
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays)
    for read in (lambda: read_reference(str(path), NETWORK, 6), lambda: check_reference(path, NETWORK, 6)):
        with pytest.raises(ValueError, match=f"statistics.npz: .*{re.escape(words)}"):
            read()


@pytest.mark.parametrize("labels", [[-1, 0, 0, 0], [np.nan] * 4, ["a"] * 4, [True] * 4])
def test_classes_of_an_archive_are_integers(labels: list[Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=pixels(4).numpy(), arr_1=np.array(labels))
    with pytest.raises(ValueError, match=r"images.npz: expected arr_1 of classes, integers of at least 0"):
        find_pictures(tmp_path / "images.npz")


@pytest.mark.parametrize("labels", ["abc", [[1, 2]], [1.5, -3], [-3], [True], [2**70], [], None])
def test_classes_of_a_series_are_integers(labels: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "series", pixels(2))
    (tmp_path / "series" / "series.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match=r"series.json is damaged"):
        find_pictures(tmp_path / "series")


class _Loud:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle was read')",))


def test_what_is_no_reference_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "grey.npz", arr_0=np.zeros((4, 6, 6), np.uint8))
    np.savez(tmp_path / "one.npz", arr_0=pixels(1).numpy())
    write_folder(tmp_path / "single", pixels(1))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 6, 6, 3)))
    np.savez(tmp_path / "labels.npz", arr_0=np.zeros((4, 6, 6, 3), np.uint8), arr_1=np.zeros(3))
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((2, 0, 0, 3), np.uint8))
    np.savez(tmp_path / "others.npz", weights=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "large.npz", arr_0=pixels(4, side=8).numpy())
    np.savez(tmp_path / "pickle.npz", mu=np.array([_Loud()], dtype=object))
    whole = tmp_path / "whole.npz"
    np.savez(whole, arr_0=pixels(40).numpy())
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-2000])
    for name, words in {
        "empty": "has no pictures and not one archive of them",
        "one.npz": "one.npz: expected at least 2 pictures to compare with, got 1",
        "single": "single: expected at least 2 pictures to compare with, got 1",
        "text.npz": "is no archive of numpy that can be read",
        "grey.npz": "expected arr_0 (N, H, H, 3) in uint8, got (4, 6, 6) in uint8",
        "floats.npz": "expected arr_0 (N, H, H, 3) in uint8, got (4, 6, 6, 3) in float64",
        "empty.npz": "expected arr_0 (N, H, H, 3) in uint8, got (2, 0, 0, 3) in uint8",
        "labels.npz": "expected arr_1 of shape (4,), got (3,)",
        "others.npz": "expected mu and sigma, or arr_0, got weights",
        "shapes.npz": "mu and sigma are no statistics of images; mean, covariance: expected shapes (F,)",
        "large.npz": "has images of 8 pixels a side, expected 6",
        "pickle.npz": "is no archive of numpy that can be read (Object arrays cannot be loaded",
        "cut.npz": "is no archive of numpy that can be read",
        "nowhere": "source: expected one of",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            read_reference(str(tmp_path / name), NETWORK, 6)


def test_an_archive_is_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "BATCH", 4)
    np.savez(tmp_path / "images.npz", arr_0=pixels(10).numpy())
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("all of it was read"))
    sizes = [len(batch) for batch in find_pictures(tmp_path / "images.npz").batches()]
    assert sizes == [4, 4, 2]
