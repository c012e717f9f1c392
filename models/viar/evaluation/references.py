"""References by name: statistics in a file, an archive of images, a folder of pictures, a data set.

A file of statistics holds arrays of numpy without pickled objects: mu (F,) and sigma (F, F), as TTUR and ADM
write them; mu_s and sigma_s of features with their place, as ADM does; arr_0 (N, H, H, 3) uint8, images, of
which ADM's has 10,000. Ours has besides: count, network (its name), and pooled (M, F), features of single
images.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checksums import OF_DAMAGED_ARCHIVES, read_json
from ..data import load_data, read_picture
from ..data.decoding import ENDINGS, decode_picture, shown
from ..data.scan import scan
from ..files import file_digest, replacing
from ..kinds import checked
from .features import FeatureNetwork, Features, features_of
from .inception import INCEPTION
from .moments import Moments
from .quality import BATCH, Reference, images_of

ARCHIVE = ".npz"
LONGEST_HEADER = 10_000  # bytes of an array: what NumPy takes too
STATISTICS = {"mu", "sigma", "mu_s", "sigma_s", "count", "network", "pooled"}
# What is read at once may take so many times the bytes of its file, or at least these: packed zeros take few.
MOST_PACKING, MOST_PACKED = 100, 2**26


@dataclass(frozen=True)
class Pictures:
    """Images of a folder or an archive, read a batch at a time.

    Attributes:
        num: N.
        image_side: H = W, pixels a side.
        labels: (N,) classes, where the files tell them.
        path: of the folder or archive.
    """

    num: int
    image_side: int
    labels: Tensor | None
    path: Path

    def batches(self) -> Iterator[Tensor]:
        """All images (B, 3, H, W) in [0, 1], in order.

        Raises:
            ValueError: a file is damaged.
        """
        if self.path.is_dir():
            return _read_pictures(self.path, self.image_side)
        return _read_archive(self.path)


@checked
def find_pictures(path: Path, image_side: int | None = None) -> Pictures:
    """What a folder or an archive of images holds, before it is read.

    A folder is looked through with all that is in it; one that `viar generate --num` wrote may hold an
    archive in place of pictures, and tells the classes. So does arr_1 (N,) of an archive.

    Args:
        path: of a folder, or of an .npz whose arr_0 (N, H, H, 3) is uint8.
        image_side: pixels a side that pictures of a folder are cut to where they have others, see
            `viar.data.read_picture`; default that of the first. An archive must have them so.

    Raises:
        ValueError: there is nothing of the kind, another size, classes that are no integers of at least 0, or
            a picture of a folder that cannot be read.
    """
    if path.is_dir():
        pictures = _whole_pictures(path)
        archives = sorted(path.glob(f"*{ARCHIVE}"))
        if not pictures and len(archives) == 1:
            return find_pictures(archives[0], image_side)
        if not pictures:
            raise ValueError(f"{shown(path)} has no pictures and not one archive of them")
        side = image_side or min(decode_picture(path / pictures[0]).size)
        return Pictures(len(pictures), side, _labels_of_series(path, pictures), path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            shape, dtype = _header(member)
            labels = _array(path, "arr_1") if "arr_1.npy" in archive.namelist() else None
            there = archive.getinfo("arr_0.npy").file_size - member.tell()
            _check_packing(path, there, shape, dtype, num_rows=BATCH)
    except OF_DAMAGED_ARCHIVES as error:
        raise ValueError(f"{shown(path)} is no archive of images with arr_0 in it ({error})") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or not all(shape):
        raise ValueError(f"{shown(path)}: expected arr_0 (N, H, H, 3) in uint8, got {shape} in {dtype}")
    if image_side not in (None, shape[1]):
        raise ValueError(f"{shown(path)} has images of {shape[1]} pixels a side, expected {image_side}")
    classes = None if labels is None else _classes(path, labels, shape[0])
    return Pictures(shape[0], shape[1], classes, path)


@checked
def read_reference(
    source: str, network: FeatureNetwork, image_side: int, *, sha256: str | None = None
) -> Reference:
    """The reference of that name.

    Args:
        source: a file of statistics or images (.npz), a folder of pictures, or a data set, see
            `viar.data.load_data`, of which training pictures are taken.
        network: whose features are compared.
        image_side: pixels a side of the images that are compared with it; pictures of a folder that have
            others are cut to it.
        sha256: what the file's digest begins with; default any.

    Raises:
        ValueError: there is no such thing, or the file has another digest, or statistics of another network
            or such as no images have; `image_side` is below 1.
    """
    if image_side < 1:
        raise ValueError(f"image_side: expected at least 1, got {image_side}")
    path = Path(source)
    if sha256 is not None:
        _check_digest(path, sha256)
    if path.suffix == ARCHIVE and path.is_file():
        return _read_file(path, network, image_side)
    if path.is_dir():
        batches = _several(find_pictures(path, image_side)).batches()
    else:
        batches = images_of(load_data(source, image_side, augmentations=()).train)
    return Reference.of(shown(source), network, features_of(network, batches))


@checked
def save_reference(reference: Reference, path: Path) -> None:
    """Write statistics, and features of single images where there are any, for `read_reference`.

    Args:
        reference: of at least 2 images.
        path: of the .npz.
    """
    arrays: dict[str, Any] = {
        "mu": reference.moments.mean.numpy(),
        "sigma": reference.moments.covariance.numpy(),
        "network": np.array(reference.network.name),
    }
    if reference.moments.count is not None:
        arrays["count"] = np.array(reference.moments.count)
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean.numpy(), "sigma_s": reference.spatial.covariance.numpy()}
    if reference.pooled is not None:
        arrays["pooled"] = reference.pooled.numpy()
    with replacing(path, in_turn=True) as file:
        np.savez(file, **arrays)


def check_reference(path: Path, network: FeatureNetwork, image_side: int) -> None:
    """Raise where `read_reference` would, as far as can be told before images are looked at.

    Args:
        path: of the file.
        network, image_side: as in `read_reference`.

    Raises:
        ValueError: the file cannot be a reference.
    """
    _read_statistics(path, network, image_side)


def _read_file(path: Path, network: FeatureNetwork, image_side: int) -> Reference:
    statistics, pictures = _read_statistics(path, network, image_side)
    if pictures is None:
        assert statistics is not None
        return statistics
    features = features_of(network, pictures.batches())
    if statistics is None:
        return Reference.of(path.name, network, features)
    return replace(statistics, pooled=features.pooled)


def _read_statistics(
    path: Path, network: FeatureNetwork, image_side: int
) -> tuple[Reference | None, Pictures | None]:
    """Statistics in a file, and images that are not read yet: one of the two at least."""
    arrays, has_images = _read_arrays(path)
    pictures = _several(find_pictures(path, image_side)) if has_images else None
    if "mu" not in arrays:
        if pictures is None:
            there = ", ".join(sorted(map(shown, _members(path))))
            raise ValueError(f"{shown(path)}: expected mu and sigma, or arr_0, got {there}")
        return None, pictures
    _check_network(path, arrays, network)
    try:
        reference = _statistics(path.name, arrays, network)
        _check_widths(reference, features_of(network, [torch.zeros(1, 3, image_side, image_side)]))
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from error
    return reference, pictures


def _several(pictures: Pictures) -> Pictures:
    """The same pictures, if they have a covariance."""
    if pictures.num < 2:
        raise ValueError(f"{shown(pictures.path)}: expected at least 2 pictures to compare with, got 1")
    return pictures


def _statistics(name: str, arrays: dict[str, Any], network: FeatureNetwork) -> Reference:
    count = _count(arrays["count"]) if "count" in arrays else None
    moments = _moments(arrays, "", count)
    spatial = _moments(arrays, "_s", count) if "mu_s" in arrays else None
    pooled = _numbers(arrays, "pooled").float() if "pooled" in arrays else None
    if pooled is not None and (pooled.ndim != 2 or len(pooled) < 2 or not pooled.isfinite().all()):
        raise ValueError(
            f"expected pooled (M, F) of finite numbers and at least 2 images, got {tuple(pooled.shape)}"
        )
    return Reference(name, network, moments, spatial, pooled)


def _check_widths(reference: Reference, seen: Features) -> None:
    """Raise `ValueError` unless statistics are of as many features as a network sees in an image."""
    found = {"mu": reference.moments.mean, "pooled": reference.pooled}
    widths = {name: (value, seen.pooled.shape[1]) for name, value in found.items()}
    if seen.spatial is not None and reference.spatial is not None:
        widths["mu_s"] = (reference.spatial.mean, seen.spatial.shape[1])
    for name, (value, width) in widths.items():
        if value is not None and value.shape[-1] != width:
            raise ValueError(
                f"expected {name} of {width} features, as {reference.network.name} sees them, got "
                f"{value.shape[-1]}; take the same network, or a reference of images"
            )


def _read_arrays(path: Path) -> tuple[dict[str, Any], bool]:
    """Arrays of a file but its images, and whether it has some."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("cut off, or something else")
        names = _members(path)
        return {name: _array(path, name) for name in names & STATISTICS}, "arr_0" in names
    except OF_DAMAGED_ARCHIVES as error:
        raise ValueError(f"{shown(path)} is no archive of numpy that can be read ({error})") from error


def _check_network(path: Path, arrays: dict[str, Any], network: FeatureNetwork) -> None:
    """Raise `ValueError` unless statistics are of this network; those that do not tell are Inception's."""
    of = str(arrays["network"]) if "network" in arrays else INCEPTION
    if of != network.name and not (of == INCEPTION and network.name.startswith(INCEPTION)):
        raise ValueError(
            f"{shown(path)} has statistics of the network {of}, images are seen by {network.name}; what two "
            "networks see cannot be compared: take the same network, or a reference of images"
        )


def _moments(arrays: dict[str, Any], ending: str, count: int | None) -> Moments:
    mean, covariance = _numbers(arrays, f"mu{ending}"), _numbers(arrays, f"sigma{ending}")
    try:
        moments = Moments(count, mean, covariance)
        moments.check_covariance()
    except ValueError as error:
        raise ValueError(f"mu{ending} and sigma{ending} are no statistics of images; {error}") from error
    return moments


def _numbers(arrays: dict[str, Any], name: str) -> Tensor:
    """An array of real numbers, in float64 whatever kind of float it has."""
    array = arrays.get(name)
    if array is None or array.dtype.kind != "f":
        found = "none" if array is None else str(array.dtype)
        raise ValueError(f"expected {name} of real numbers in a type of floats, got {found}")
    return torch.from_numpy(array.astype(np.float64))


def _count(array: Any) -> int:
    if array.dtype.kind not in "iu" or array.shape or array < 2:
        raise ValueError(
            f"expected count, one integer of at least 2, got {array.tolist()!r:.80} in {array.dtype}"
        )
    return int(array)


def _classes(path: Path, labels: Any, num: int) -> Tensor:
    """Classes of images from an array of them."""
    if labels.shape != (num,):
        raise ValueError(f"{shown(path)}: expected arr_1 of shape ({num},), got {labels.shape}")
    found = labels.min() if labels.dtype.kind in "iu" else labels.dtype
    if labels.dtype.kind not in "iu" or found < 0 or labels.max() >= 2**63:
        raise ValueError(
            f"{shown(path)}: expected arr_1 of classes, integers of at least 0, got some of {found}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _check_digest(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"sha256: expected a file to have a digest, {shown(path)} is none")
    found = file_digest(path)
    if not sha256 or not found.startswith(sha256.lower()):
        raise ValueError(
            f"sha256: {shown(path)} is another file: expected {sha256}, got {found}; fetch it again"
        )


def _whole_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder; one that cannot be read is not left out, as figures would be of fewer."""
    found = scan(folder)
    broken = [
        skipped
        for skipped in found.skipped
        if skipped.path.suffix.lower() in ENDINGS and not skipped.path.name.startswith(".")
    ]
    if broken:
        raise ValueError(
            f"{shown(folder / broken[0].path)}: {broken[0].reason}; {len(broken)} of "
            f"{len(broken) + len(found.pictures)} pictures cannot be read, mend or remove them"
        )
    return found.pictures


def _read_pictures(folder: Path, image_side: int) -> Iterator[Tensor]:
    pictures = scan(folder).pictures
    for start in range(0, len(pictures), BATCH):
        paths = pictures[start : start + BATCH]
        yield torch.stack([read_picture(folder / path, image_side)[0] for path in paths])


def _read_archive(path: Path) -> Iterator[Tensor]:
    """Batches of arr_0, of which no more is held than one."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            (num, *shape), _ = _header(member)
            size = int(np.prod(shape))
            for start in range(0, num, BATCH):
                rows = min(BATCH, num - start)
                values = np.frombuffer(member.read(rows * size), np.uint8).reshape(rows, *shape)
                yield torch.from_numpy(values.copy()).permute(0, 3, 1, 2).float() / 255
            _check_end(member)
    except OF_DAMAGED_ARCHIVES as error:
        raise ValueError(f"{shown(path)} is damaged ({error}); fetch or make it again") from error


def _header(member: Any, *, by_rows: bool = True) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array that begins here; its numbers follow, if `by_rows` row by row."""
    version = np.lib.format.read_magic(member)
    is_short = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_short else np.lib.format.read_array_header_2_0
    told = member.read(2 if is_short else 4)
    length = int.from_bytes(told, "little")
    if length > LONGEST_HEADER:  # NumPy reads it first, whatever memory that takes, and refuses it then
        raise ValueError(f"a header of {length:,} bytes, expected at most {LONGEST_HEADER:,}")
    shape, by_columns, dtype = read(BytesIO(told + member.read(length)))
    if any(type(number) is not int for number in shape):
        raise ValueError(f"a shape of something else than integers, {shape}")
    if by_columns and by_rows:
        raise ValueError("its rows are not one after the other")
    return shape, dtype


def _members(path: Path) -> set[str]:
    """Names of the arrays of an archive."""
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _array(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        with archive.open(f"{name}.npy") as member:
            shape, dtype = _header(member, by_rows=False)
            there = archive.getinfo(f"{name}.npy").file_size - member.tell()
            _check_packing(path, there, shape, dtype)
        with archive.open(f"{name}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            _check_end(member)
            return array


def _check_end(member: Any) -> None:
    """Raise where an array is longer than its header says; its checksum is looked at where it ends."""
    if member.read(1):
        raise ValueError("an array is longer than its header says")


def _check_packing(
    path: Path, there: int, shape: tuple[int, ...], dtype: np.dtype[Any], num_rows: int | None = None
) -> None:
    """Raise `ValueError` for an array that is not all there, or takes far more memory than its file is large.

    Args:
        path: of the archive.
        there: bytes of its numbers, unpacked.
        shape: what it tells.
        dtype: likewise.
        num_rows: that are read at a time; default all.
    """
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded, for they may hold code")
    size = math.prod(shape) * dtype.itemsize
    if size != there:
        raise ValueError(f"{shape} of {dtype} take {size:,} bytes, and there are {there:,}")
    rows = shape if num_rows is None else (*(min(num_rows, num) for num in shape[:1]), *shape[1:])
    taken = math.prod(rows) * dtype.itemsize
    if taken > max(MOST_PACKED, MOST_PACKING * path.stat().st_size):
        raise ValueError(
            f"{rows} of {dtype} take {taken:,} bytes, packed into a file of {path.stat().st_size:,}"
        )


def _labels_of_series(folder: Path, pictures: list[Path]) -> Tensor | None:
    """Classes of a series of `viar generate`, which gives them in turn; its pictures' names are numbers."""
    settings = folder / "series.json"
    if not settings.is_file():
        return None
    try:
        classes = read_json(settings)["labels"]
        if not (isinstance(classes, list) and all(type(n) is int and 0 <= n < 2**63 for n in classes)):
            raise ValueError("expected labels, integers of at least 0")
        return torch.tensor([classes[int(picture.stem) % len(classes)] for picture in pictures])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{shown(settings)} is damaged ({error}); generate the series anew") from error
