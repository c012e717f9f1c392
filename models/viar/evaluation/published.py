"""The published evaluation of VAR and VIAR on ImageNet at 256 pixels: its settings, its files, its figures.

Sources: VIAR (arXiv 2605.01220) and its program, ADM (arXiv 2105.05233) for the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import file_digest
from .inception import ADDRESS, WEIGHTS

NUM_IMAGES = 50_000  # 50 of each of 1,000 classes
ITERATIONS = 10  # of VIAR at every scale

_VAR = "https://huggingface.co/FoundationVision/var/resolve/main"
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256"


@dataclass(frozen=True)
class PublishedFile:
    """A file that others published.

    Attributes:
        address: where it is.
        sha256: of its bytes, where that is on record beside the file itself; else `None`.
    """

    address: str
    sha256: str | None = None


TOKENIZER, VIAR, REFERENCE = "vae_ch160v4096z32.pth", "viar.pth", "VIRTUAL_imagenet256_labeled.npz"
FILES = {
    # As its repository records it for large files; 436,075,834 bytes.
    TOKENIZER: PublishedFile(
        f"{_VAR}/{TOKENIZER}", "7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c"
    ),
    VIAR: PublishedFile(f"https://huggingface.co/mobiushy/VIAR/resolve/main/{VIAR}"),
    **{name: PublishedFile(f"{_VAR}/{name}") for name in (f"var_d{depth}.pth" for depth in (16, 20, 24, 30))},
    REFERENCE: PublishedFile(f"{_ADM}/{REFERENCE}"),
    # It begins as the name tells, which is how PyTorch's hub checks it; 95,628,359 bytes.
    WEIGHTS: PublishedFile(ADDRESS, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
}

# By model, guidance and iterations: what is published of 50,000 images.
FIGURES: dict[tuple[str, float, int | None], dict[str, float]] = {
    (model, cfg, iterations): dict(
        zip(("fid", "sfid", "inception_score", "precision", "recall"), figures, strict=False)
    )
    for model, cfg, iterations, *figures in (
        ("VAR-d30", 2.0, None, 2.05, 8.86, 328.5, 0.82, 0.59),
        ("VAR-d30", 1.5, None, 2.08, 8.82, 306.8, 0.82, 0.59),
        ("VIAR", 2.0, 10, 2.35, 7.92, 330.7, 0.83, 0.58),
        ("VIAR", 1.5, 10, 2.16, 8.07, 300.1, 0.81, 0.59),
        ("VIAR", 1.5, 8, 2.17),
        ("VIAR", 1.5, 5, 2.22),
        ("VIAR", 1.5, 2, 2.39),
    )
}


def checked_digests(paths: Mapping[str, Path], given: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of files: that on record, of a published file whose name is known, and each given one found.

    Args:
        paths: of the files, by the flag that names each.
        given: digests, or beginnings of such, that some of the files must have.

    Raises:
        ValueError: there is no such file, other bytes than are on record, or none of a given digest.
    """
    digests = {}
    for flag, path in paths.items():
        published = FILES.get(path.name)
        if not path.is_file():
            where = f"; it is at {published.address}" if published else ""
            raise ValueError(f"{flag}: no file {path}{where}")
        digests[flag] = file_digest(path)
        if published and published.sha256 not in (None, digests[flag]):
            raise ValueError(
                f"{flag}: expected {path.name} to have the SHA-256 {published.sha256}, got {digests[flag]}; "
                f"get it anew from {published.address}, or give a file of your own another name"
            )
    for digest in given:
        if not digest or not any(found.startswith(digest.lower()) for found in digests.values()):
            found = ", ".join(f"{flag} {digest}" for flag, digest in digests.items())
            raise ValueError(f"--sha256: expected a file with {digest!r}, got {found}; get the files anew")
    return digests
