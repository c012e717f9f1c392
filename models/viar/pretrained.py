"""Saving, loading and telling apart, shared by both models; and what a folder that has no model is."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .cards import ENDING, model_card
from .checksums import digest_of, load_tensors, read_json, save_tensors
from .files import alone, flush, naming
from .kinds import check_kind

CONFIG, WEIGHTS, CARD, STATE = "config.json", "model.safetensors", "README.md", "state"
# A setting that config.json of one kind has and that of the other has not.
KINDS = {"trunk": "a transformer (VAR or VIAR)", "multipliers": "a tokenizer"}
# What other work leaves in its folder, and what that is; the first that is there is named.
MARKS = {
    STATE: "an unfinished training run; run its command again with the same --out to end it",
    f"{STATE}.old": "an unfinished training run; run its command again with the same --out to end it",
    "series.json": "a series of images",
    "shards.json": "tokens of a data set, which viar train reads as --data",
    "classifier.safetensors": "a classifier",
    "metrics.jsonl": "a training run that was interrupted before its first state; start it again",
    "done.json": "a stage of the demo",
    "summary.json": "a demo; its models are the folders tokenizer, viar and var in it",
}
# What settings of a wrong type or size raise where a model is made of them, and damaged weights.
OF_DAMAGE = (TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, EOFError, UnpicklingError)
# How a file of the hub is asked for; the last two by releases of huggingface_hub before 1.
DOWNLOAD = (
    *("revision", "cache_dir", "force_download", "local_files_only", "token"),
    *("proxies", "resume_download"),
)
# Tensors, and numbers in them, that are made before settings are found to be of another model.
MORE_TENSORS, MORE_NUMBERS = 1000, 2**22
LISTED = 4  # names of tensors that an error spells out of each kind


class Pretrained(PyTorchModelHubMixin):
    """`save_pretrained(path)` and `from_pretrained(path_or_hub_id)`: config.json and model.safetensors.

    Missing or unexpected weights are an error unless `strict=False` is given: the mixin's default would
    leave missing weights at their random start. The weights are kept with a checksum of themselves and of the
    settings; what was saved without one is taken as it is.
    """

    telling: ClassVar[str]  # the setting of `KINDS` by which config.json tells that it is of this class

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """The model of a folder that `save_pretrained` wrote, or of a name on the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: the folder or the name; "NAME@REVISION" names a commit, tag or
                branch on the hub, as `revision="..."` does.
            options: of `huggingface_hub.ModelHubMixin.from_pretrained`; `strict=False` leaves weights that
                are missing at their random start.

        Raises:
            ValueError: no such folder or name, or one that holds something else, a part, or damaged files; or
                config.json or the weights are not as they were saved.
        """
        source = str(pretrained_model_name_or_path)
        if not os.path.exists(source) and "revision" not in options:
            source, _, revision = source.partition("@")
            options |= {"revision": revision} if revision else {}
        if os.path.isdir(source):
            _check_kind(source, read_config(Path(source)), cls.telling)
        elif os.path.exists(source):
            raise ValueError(f"{source}: a file, expected a folder; viar.load_official reads published files")
        try:
            with _quiet_hub():
                loaded: Self = super().from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            if os.path.isdir(source) or isinstance(error, _NotThisModel):
                raise ValueError(_named(source, error)) from error
            raise ValueError(
                f"{source}: no such folder, and no name that can be read from the Hugging Face hub "
                f"({first_line(error)})"
            ) from error
        except OF_DAMAGE as error:
            reason = f"no model can be made of {CONFIG} and {WEIGHTS} ({first_line(error)})"
            raise ValueError(f"{source}: {reason}") from error
        return loaded

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:
        """Write config.json, model.safetensors and, where there is none, README.md: each whole or not at all.

        Of several processes that do so at once, one comes after the other. One that is killed may leave no
        weights, and never those of another model than the settings.

        Args:
            save_directory: made if it is not there.
            options: of `huggingface_hub.ModelHubMixin.save_pretrained`; `model_card_kwargs={"run": ...}` has
                what run.json tells of the training.
        """
        check_kind("save_directory: expected", save_directory, str | Path)
        folder = Path(save_directory)
        fresh = folder / ".saving"
        with alone(fresh):
            with naming(folder):
                pushed = super().save_pretrained(fresh, **{"repo_id": folder.name, **options})
            if (folder / CARD).exists():
                (fresh / CARD).unlink()
            paths = sorted(fresh.iterdir())
            for path in paths:
                flush(path)
            # Between the two moves they would be taken for the new ones.
            if _of_other_settings(folder, fresh):
                (folder / WEIGHTS).unlink(missing_ok=True)
                flush(folder)
            for path in paths:
                os.replace(path, folder / path.name)
        flush(folder)
        return pushed

    def generate_model_card(self, run: Mapping[str, Any] | None = None, ending: str = ENDING) -> ModelCard:
        """README.md of the model, see `viar.cards`.

        Args:
            run: what run.json has of its training; default: that is not known.
            ending: its last sections, in Markdown; default one that says that no licence is stated.
        """
        assert isinstance(self, nn.Module)
        num_parameters = sum(p.numel() for p in self.parameters())
        return model_card(self.config.to_dict(), num_parameters, run, ending)  # type: ignore[operator, union-attr]

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **options: Any
    ) -> Self:
        """In place of the mixin's, which takes memory before it compares, and pickles from the hub."""
        config = options.get("config")
        download = {name: options.pop(name) for name in DOWNLOAD if name in options}
        try:
            if isinstance(config, Mapping) or config is None:  # before weights are downloaded
                _check_kind(model_id, config, cls.telling)
            is_here = os.path.isdir(model_id)
            weights = os.path.join(model_id, WEIGHTS) if is_here else _downloaded(model_id, **download)
            with not_larger(Path(weights)) if strict else nullcontext():
                model = cls(**options)
        except SafetensorError as error:
            raise _NotThisModel(f"{WEIGHTS} is damaged ({first_line(error)})") from error
        except ValueError as error:
            raise _NotThisModel(str(error)) from error
        loaded: Self = cls._load_as_safetensor(model, weights, map_location, strict)
        return loaded

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        save_tensors(self.state_dict(), save_directory / WEIGHTS, settings_text(self._hub_mixin_config))

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        path = Path(model_file)
        settings, look = settings_text(read_config(path.parent)), partial(check_tensors, model, strict=strict)
        try:
            tensors = load_tensors(path, settings, look)
        except (SafetensorError, OSError) as error:
            raise _NotThisModel(f"{WEIGHTS} is damaged ({first_line(error)})") from error
        except ValueError as error:
            raise _NotThisModel(str(error)) from error
        model.load_state_dict(tensors, strict=strict)
        return model.eval()


def _of_other_settings(folder: Path, fresh: Path) -> bool:
    """Whether a folder has a model of other settings than a fresh one."""
    path = folder / CONFIG
    return path.exists() and path.read_bytes() != (fresh / CONFIG).read_bytes()


def fingerprint(module: nn.Module) -> str:
    """Hash of config and weights, whatever device they are on.

    Args:
        module: a tokenizer, a transformer, or any other, of which the text of its layers counts.
    """
    config = getattr(module, "config", None)
    settings = str(module) if config is None else settings_text(config.to_dict())
    return digest_of(module.state_dict(), settings)[:32]


def settings_text(settings: Any) -> str:
    """Settings as one text, however they lie in config.json."""
    return json.dumps(settings, sort_keys=True)


class _NotThisModel(ValueError):
    """The files are there, and are not those of the model that was asked for."""


def read_config(folder: Path) -> dict[str, Any]:
    """Settings of the model in a folder of `save_pretrained`.

    Raises:
        ValueError: the folder holds no model, or a part of one; the message says what was found.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of save_pretrained, found no folder")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: expected {CONFIG} and {WEIGHTS}, found no {' and no '.join(missing)}; it is "
            f"{_contents(folder)}"
        )
    path = folder / CONFIG
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected settings as JSON, found a damaged file ({error})") from error


@contextmanager
def not_larger(weights: Path) -> Iterator[None]:
    """Inside, this thread makes no model of far more than a file has, which settings may tell of.

    What is a little too large is made, and `check_tensors` says what does not fit.

    Args:
        weights: a safetensors file, of which the header alone is read.

    Raises:
        ValueError: when parameters are made beyond that.
        SafetensorError: the file is damaged.
    """
    with safe_open(weights, "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    with _NotLarger(2 * len(sizes) + MORE_TENSORS, 2 * sum(sizes) + MORE_NUMBERS):
        yield


class _NotLarger(TorchFunctionMode):
    """Counts tensors that are made of a size, and the numbers in them, before memory is taken for them."""

    MAKE = (torch.empty, torch.full, torch.zeros, torch.ones)

    def __init__(self, tensors: int, numbers: int) -> None:
        super().__init__()
        self.tensors, self.numbers = tensors, numbers  # that may yet be made

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.MAKE and args:
            self.tensors -= 1
            self.numbers -= math.prod(args if isinstance(args[0], int) else args[0])
            if self.tensors < 0 or self.numbers < 0:
                raise ValueError(f"its settings are of a far larger model than {WEIGHTS} has tensors for")
        return func(*args, **(kwargs or {}))


def _downloaded(name: str, **options: Any) -> str:
    """Where the weights of a model on the hub are kept."""
    try:
        return str(hf_hub_download(name, WEIGHTS, **options))
    except LocalEntryNotFoundError:  # without a network, and not downloaded before
        raise
    except EntryNotFoundError as error:
        raise _NotThisModel(f"{name}: has no {WEIGHTS}; pickles are not read from the hub") from error


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Raise `ValueError` that lists the tensors that do not fit `model`.

    Args:
        model: whose `state_dict` names what is expected, and its shapes.
        tensors: what was found, of any shape.
        strict: whether missing and unexpected ones count.
    """
    expected = model.state_dict()
    groups = {
        "missing": [name for name in expected if strict and name not in tensors],
        "unexpected": [name for name in tensors if strict and name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted.shape)}"
            for name, wanted in expected.items()
            if name in tensors and tensors[name].shape != wanted.shape
        ],
    }
    if found := [f"{len(names)} {what}: {_listed(names)}" for what, names in groups.items() if names]:
        raise ValueError(f"its weights are not those of its settings; {'; '.join(found)}")


def _check_kind(source: str, config: Mapping[str, Any] | None, telling: str) -> None:
    """Raise `ValueError` unless settings are of the kind that `telling` tells."""
    if config is None:
        raise ValueError(f"{source}: expected {KINDS[telling]}, found no {CONFIG} with settings")
    if telling in config:
        return
    found = next((kind for name, kind in KINDS.items() if name in config), None)
    if found is None:
        raise ValueError(
            f"{source}: expected {KINDS[telling]}, found a {CONFIG} of something else, without {telling!r}"
        )
    raise ValueError(f"{source}: expected {KINDS[telling]}, found {found}; give the folder of the other one")


def _contents(folder: Path) -> str:
    """What a folder is that is no whole model, in words."""
    for name, kind in MARKS.items():
        if (folder / name).exists():
            return kind
    models = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if models:
        return f"a folder with models in it; give one of {_listed(models)}"
    names = sorted(path.name for path in folder.iterdir())
    return f"a folder with {_listed(names)}" if names else "an empty folder"


def _listed(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _named(source: str, error: Exception) -> str:
    """The message of an error, which begins with what it is about."""
    text = first_line(error)
    return text if text.startswith(source) else f"{source}: {text}"


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub's warning for each time that it tries again: the error says what came of it."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
