"""Published checkpoints to models and back, in memory and as files."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checksums import load_tensors, save_tensors
from ..files import alone, begun_beside, replacing, replacing_path
from ..kinds import check_kind, checked
from ..model.config import ExplicitTrunkConfig, ImplicitTrunkConfig, TokenizerConfig, TransformerConfig
from ..model.scales import scale_ids
from ..model.transformer import NextScaleTransformer
from ..pickles import HoldsCode, load_pickled
from ..pretrained import (
    CARD,
    OF_DAMAGE,
    WEIGHTS,
    check_tensors,
    first_line,
    not_larger,
    read_config,
    settings_text,
)
from ..tokenizer import Tokenizer
from .official import (
    NUM_GROUPS,
    PHI_RATIO,
    Model,
    listed,
    official_config,
    official_names,
    official_tensors,
)

# Keys under which published programs keep a state dict. The first that is there is entered, so a transformer
# is found before the tokenizer that was saved with it.
PUBLISHED_TRUNKS = (ExplicitTrunkConfig, ImplicitTrunkConfig)
LEVELS = ("trainer", "var_wo_ddp", "vae_local", "model", "state_dict")
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put them before names


def load_official(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    sides: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> Model:
    """A published tokenizer, VAR or VIAR, recognised by its tensors, in evaluation mode on the CPU.

    Sizes are read off the tensors, and the buffers that are derived here (scale of each token, mask, zero
    bias of the keys) must equal ours. What no tensor tells is as published: 32 groups and a ratio of 0.5 in
    the tokenizer; drop path, label dropout and the iterations of VIAR as in `TransformerConfig`. The depth D
    of a VIAR, which sets its drop path, is its width / 64 (1920 / 64 = 30), rounded down, or the number of
    its blocks where that is more.

    Parameters are float32, whatever the type in the checkpoint, contiguous, and require gradient. No random
    number is drawn. Float32 tensors of a file are taken as they are and may stay mapped to it, so write no
    other data into that file while the model lives; those of a state dict are copied.

    Args:
        path_or_state_dict: a `.safetensors`, or a file of `torch.save` (any other ending), which is read
            without running code. Wrappings of the published programs (`{"trainer": {"var_wo_ddp": ...}}`,
            "vae_local", "model", "state_dict") and prefixes (`module.`, `_orig_mod.`) are taken off. Where a
            transformer comes with its tokenizer, the transformer is meant.
        sides: of a tokenizer, default the 256-pixel ladder (1, 2, 3, 4, 5, 6, 8, 10, 13, 16); a transformer
            has its own, which must then be equal.
        num_heads: of a transformer without a learned attention scale, default heads 64 wide.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or holds code; tensors are missing, unexpected, of another
            shape, or derived buffers of another value (one message lists them all); `sides` or `num_heads`
            contradict the tensors.
    """
    check_kind("sides: expected", sides, Sequence[int] | None)
    check_kind("num_heads: expected", num_heads, int | None)
    from_file, origin, values = False, "the state dict", path_or_state_dict
    with torch.device("cpu"):  # whatever the default device is
        if isinstance(path_or_state_dict, str | os.PathLike):
            from_file, origin, values = True, str(path_or_state_dict), _read(Path(path_or_state_dict))
        state = _tensors(values, origin)
        if from_file and (spread := [key for key, tensor in state.items() if not _is_held(tensor)]):
            raise ValueError(
                f"{origin}: expected tensors with a number for each place, found others under "
                f"{listed(spread)}; save what .to_dense() or .clone() makes of them"
            )
        try:
            model = _on_meta(official_config(state, None if sides is None else tuple(sides), num_heads))
            _check_tensors(state, model)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    names = official_names(model).items()
    ours = {key: _float32(state[name], copy=not from_file) for name, key in names if key is not None}
    model.load_state_dict(ours, assign=True)
    return model.eval()


def export_official(model: Model) -> dict[str, Tensor]:
    """State dict of `model` under the published names, in the published order, derived buffers included.

    The inverse of `load_official`. The tensors share memory with the model's. What the published state dict
    does not hold is lost: of both, what concerns training only; of VIAR, depth and default iterations; the
    number of heads where they have no learned scale; the sides of a tokenizer.

    Raises:
        TypeError: neither a `Tokenizer` nor a `NextScaleTransformer`.
        ValueError: a tokenizer with settings, or a trunk, that the published program does not have.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"model: expected a Tokenizer or a NextScaleTransformer, got {type(model).__name__}; "
            "unwrap a compiled or distributed model first"
        )
    if isinstance(model, NextScaleTransformer) and type(model.config.trunk) not in PUBLISHED_TRUNKS:
        raise ValueError(
            f"model: the published programs have no trunk of {type(model.config.trunk).__name__}; "
            "use save_pretrained"
        )
    if isinstance(model, Tokenizer):
        for name, published in (("num_groups", NUM_GROUPS), ("phi_ratio", PHI_RATIO)):
            if getattr(model.config, name) != published:
                raise ValueError(
                    f"model: the published tokenizer has {name}={published}, which its tensors do not tell, "
                    f"got {getattr(model.config, name)}; use save_pretrained"
                )
    return official_tensors(model)


@checked
def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    sides: Sequence[int] | None = None,
    num_heads: int | None = None,
    overwrite: bool = False,
) -> Model:
    """Write a published checkpoint as a folder of `save_pretrained`, or such a folder as a checkpoint.

    The direction is what `source` asks for. Everything is written beside `out` first, then moved there; an
    existing folder loses only the files that are written anew.

    Args:
        source: file for `load_official`, or a folder with config.json and model.safetensors.
        out: folder; or file, ending in .safetensors or .pth.
        sides: see `load_official`.
        num_heads: see `load_official`.
        overwrite: replace what `out` holds.

    Returns:
        The model that was converted.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `out` exists and `overwrite` is not given, or has the wrong ending; `sides` or
            `num_heads` given for a folder, whose config.json has them; see also `load_official`.
    """
    if source.is_dir():
        if sides is not None or num_heads is not None:
            raise ValueError(f"sides, num_heads: {source} is a folder whose config.json has them; leave them")
        _check_out(out, (".safetensors", ".pth"), overwrite)
        model = _load_folder(source)
        tensors = export_official(model)
        with replacing_path(Path(os.path.realpath(out))) as fresh:
            if out.suffix == ".safetensors":
                save_tensors(tensors, fresh)
            else:
                with fresh.open("wb") as file:
                    torch.save(tensors, file)
    else:
        _check_out(out, None, overwrite)
        model = load_official(source, sides=sides, num_heads=num_heads)
        out = Path(os.path.realpath(out))
        if out.is_dir():
            # What a conversion that was killed when it had made the folder left beside it is gone then.
            with (
                suppress(OSError),
                alone(begun_beside(out)),
            ):  # beside it nothing may be allowed to be written
                pass
            model.save_pretrained(out)
            with replacing(out / CARD) as file:  # which else would stay that of the model before
                file.write(str(model.generate_model_card()).encode())
        else:
            with replacing_path(out) as fresh:
                model.save_pretrained(fresh)
    return model


@checked
def describe(model: Model) -> dict[str, str]:
    """What a model is, for people: kind, sizes, number of parameters.

    Args:
        model: a `Tokenizer` or a `NextScaleTransformer`.

    Returns:
        Texts by name, in the order to show them: "kind" is tokenizer, VAR or VIAR; a tokenizer has "pixels"
        a side and "channels" a resolution, a transformer "blocks", "depth", "width", "heads" and "classes";
        both have "sides" of the scales, "codes" and "parameters".
    """
    config = model.config
    common = {
        "sides": " ".join(map(str, config.sides)),
        "codes": f"{config.codebook_size} of {config.code_channels} channels",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
    }
    if isinstance(config, TokenizerConfig):
        channels = " ".join(str(config.base_channels * multiplier) for multiplier in config.multipliers)
        return {"kind": "tokenizer", "pixels": str(config.image_side), "channels": channels, **common}
    trunk, kind, blocks = config.trunk, "VAR", str(config.depth)
    if isinstance(trunk, ImplicitTrunkConfig):
        kind, blocks = "VIAR", f"{trunk.num_pre} + implicit + {trunk.num_post}"
    return {
        "kind": kind,
        "blocks": blocks,
        "depth": str(config.depth),
        "width": str(config.width),
        "heads": str(config.num_heads),
        "classes": str(config.num_classes),
        **common,
    }


# Files


def _read(path: Path) -> Any:
    """What a checkpoint file holds, its tensors on the CPU; no code of it is run."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a file; read folders with from_pretrained")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    path.open("rb").close()  # A file without read permission raises here, and is not called damaged below.
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        # torch.load warns of old pickles before it refuses them; the error says enough.
        with warnings.catch_warnings(action="ignore"):
            return load_pickled(path, mapped=True, look=_check_sums)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    except _Damaged as error:
        raise ValueError(f"{path}: {error}") from None
    except HoldsCode as error:
        raise ValueError(
            f"{path}: {error}; where you trust the file, read it with torch.load(weights_only=False) and "
            "save its state dict alone"
        ) from None
    except Exception as error:  # Bytes that are no pickle can make the unpickler raise anything.
        raise ValueError(
            f"{path}: not a checkpoint, or a damaged one ({first_line(error)}); expected a file of "
            "torch.save or a .safetensors"
        ) from error


class _Damaged(ValueError):
    """A file has a checksum, and holds something else."""


def _check_sums(path: Path) -> None:
    """Raise `_Damaged` unless an archive of torch.save is as it was written: torch.load does not ask."""
    with zipfile.ZipFile(path) as archive:
        name = archive.testzip()
    if name is not None:
        raise _Damaged(
            f"{name} in it is damaged, its CRC-32 is another; fetch or make it again (where it was written "
            "without sums, by torch.serialization.set_crc32_options(False), load it and save it with them)"
        )


def _tensors(values: Any, origin: str) -> dict[str, Tensor]:
    """The state dict inside of `values`, without prefixes."""
    while isinstance(values, Mapping) and not any(isinstance(value, Tensor) for value in values.values()):
        level = next((name for name in LEVELS if isinstance(values.get(name), Mapping)), None)
        if level is None:
            break
        values = values[level]
    if not isinstance(values, Mapping):
        raise ValueError(f"{origin}: expected a dictionary of tensors, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{origin}: expected a dictionary of tensors, got an empty one")
    if others := [str(key) for key, value in values.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{origin}: expected tensors alone, found other values under {listed(others)}; pass the state "
            "dict inside, if there is one"
        )
    state = {str(key): value for key, value in values.items()}
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_held(tensor: Tensor) -> bool:
    """Whether memory has every number of a tensor: an expanded one can be of any shape, and take none."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _load_folder(folder: Path) -> Model:
    """Like `from_pretrained`, without drawing initial weights."""
    values = read_config(folder)
    try:
        with not_larger(folder / WEIGHTS):
            model = _on_meta((TransformerConfig if "trunk" in values else TokenizerConfig).from_dict(values))
        tensors = load_tensors(folder / WEIGHTS, settings_text(values), partial(check_tensors, model))
        model.load_state_dict(tensors, assign=True)
    except (*OF_DAMAGE, ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: not a model of this package: {error}") from error
    return model


def _check_out(out: Path, endings: tuple[str, ...] | None, overwrite: bool) -> None:
    """Raise unless `out` may be written: a file with one of `endings`, or a folder."""
    if endings and out.suffix not in endings:
        raise ValueError(f"out: a folder becomes a file ending in {' or '.join(endings)}, got {out}")
    if not endings and out.suffix in (".safetensors", ".pth"):
        raise ValueError(f"out: a checkpoint becomes a folder, got {out}")
    if not out.exists():
        return
    if out.is_dir() == bool(endings):
        raise ValueError(f"out: {out} is a {'folder' if endings else 'file'}; give another name")
    if not overwrite and (endings or any(out.iterdir())):
        raise ValueError(f"out: {out} exists; give another name, or overwrite (--overwrite)")


# Building and checking


def _on_meta(config: TokenizerConfig | TransformerConfig) -> Model:
    """The model of `config` with weights that have shapes and no memory (device "meta").

    Scales of tokens, which no state dict of this package holds, have their values, on the CPU.
    """
    with torch.device("meta"):
        if isinstance(config, TokenizerConfig):
            return Tokenizer(config)
        model = NextScaleTransformer(config)
    with torch.device("cpu"):
        model.scale_ids = scale_ids(config.sides)
    return model


def _float32(tensor: Tensor, *, copy: bool) -> Tensor:
    """The tensor as contiguous float32 on the CPU; one without values (device "meta") stays there."""
    device = "meta" if tensor.is_meta else "cpu"
    return tensor.detach().to(device, torch.float32, copy=copy).contiguous()


def _check_tensors(state: dict[str, Tensor], model: Model) -> None:
    """Raise `ValueError` that lists every tensor of `state` (published names) that does not fit `model`."""
    expected = official_tensors(model)
    derived = [name for name, key in official_names(model).items() if key is None]
    common = [(name, tensor, state[name]) for name, tensor in expected.items() if name in state]
    same_shape = [(name, tensor, found) for name, tensor, found in common if tensor.shape == found.shape]
    groups = {
        "missing": [f"{name} {_shape(tensor)}" for name, tensor in expected.items() if name not in state],
        "unexpected": [f"{name} {_shape(tensor)}" for name, tensor in state.items() if name not in expected],
        "of another shape": [
            f"{name}: expected {_shape(tensor)}, found {_shape(found)}"
            for name, tensor, found in common
            if tensor.shape != found.shape
        ],
        "of another type": [
            f"{name}: expected floating point, found {found.dtype}"
            for name, tensor, found in common
            if tensor.is_floating_point() and not found.is_floating_point()
        ],
        "of another value than scales, mask and absent key biases have": [
            name for name, tensor, found in same_shape if name in derived and not _equal(tensor, found)
        ],
    }
    if lines := [f"\n  {len(group)} {what}: {listed(group)}" for what, group in groups.items() if group]:
        what = ", ".join(f"{name} {value}" for name, value in describe(model).items() if name != "parameters")
        raise ValueError(f"not the tensors of the model it looks like ({what}):{''.join(lines)}")


def _equal(tensor: Tensor, found: Tensor) -> bool:
    """Whether values agree after conversion to the type of `tensor`; a `found` without values passes."""
    return found.is_meta or torch.equal(torch.empty_like(tensor).copy_(found), tensor)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
