"""Checks of an adapter folder's files before anything uses them: they may come from an attacker.

PEFT imports a module that `adapter_config.json` names (megatron_core), takes regular expressions from it, and makes tensors of
whatever rank it says; so the settings must be plain LoRA's, and the weights' header must agree with them, before PEFT or a stage
of the engine sees the folder.

Shapes: rank r, in K, out N of a projection.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finlora.configfile import show
from finlora.errors import AdapterError
from finlora.formula.llama import PROJECTION_NAMES, LlamaShape
from finlora.formula.low_rank import (
    MAX_RANK,
    LoraSettings,
    UpdateSite,
    adapted_name,
    explain_foreign,
    foreign_settings,
    is_magnitude,
    list_sites,
    magnitude_name,
    rank_axis,
    read_settings,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_MAX_CONFIG_BYTES = 2**18
_MAX_WEIGHTS_BYTES = 8 * 2**30
_DTYPES = ("F64", "F32", "F16", "BF16")


def check_file(path: Path, max_bytes: int) -> None:
    """Refuse what is not a regular file of the folder: a pipe would block, a link could reveal files elsewhere.

    The folder itself may be a link, as mounted ones often are; links within it are followed.

    Raises:
        AdapterError: says what was found.
    """
    folder = path.parent
    try:
        facts = path.stat()
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise AdapterError(
            f"{folder} has no {path.name}: expected an adapter folder as `finlora train` writes it (RUN/adapter)."
        ) from error
    if not stat.S_ISREG(facts.st_mode) or not is_inside:
        found = "a link to a file outside of the folder" if stat.S_ISREG(facts.st_mode) else "not a regular file"
        raise AdapterError(f"{path} is {found}: copy the adapter's own files.")
    if facts.st_size > max_bytes:
        raise AdapterError(
            f"{path} has {facts.st_size:,} bytes, more than {max_bytes:,}: it is not a file of an adapter."
        )


def read_peft_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json without judging what it says.

    Raises:
        AdapterError: it is missing or damaged.
    """
    path = folder / ADAPTER_CONFIG
    check_file(path, _MAX_CONFIG_BYTES)
    try:
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not a LoRA configuration ({type(error).__name__}): copy it again.") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path} holds a {type(values).__name__}: expected PEFT's settings. Copy it again.")
    return values


def read_lora_settings(folder: Path) -> LoraSettings:
    """Read adapter_config.json of LoRA, rsLoRA or DoRA.

    Raises:
        AdapterError: it is missing or damaged, or needs another formula than scale B A.
    """
    path = folder / ADAPTER_CONFIG
    values = read_peft_settings(folder)
    foreign = foreign_settings(values)
    odd = [f"{show(key)[1:-1]}={show(value)}" for key, value in foreign.items()]
    if odd:
        because = explain_foreign(foreign)
        raise AdapterError(
            f"{path} is not plain LoRA ({', '.join(odd[:8])}): FinLoRA computes W0 + scale B A, and DoRA."
            f"{because and f' {because[0].upper()}{because[1:]}.'} Train the adapter with `finlora train`, or use PEFT itself."
        )
    settings = read_settings(values)
    if settings is None:
        found = ", ".join(f"{key}={show(values.get(key))}" for key in ("r", "lora_alpha", "target_modules"))
        raise AdapterError(
            f"{path} has {found}: expected a rank of 1 to {MAX_RANK:,}, a positive number and some of "
            f"{', '.join(PROJECTION_NAMES)}."
        )
    return settings


@contextmanager
def open_weights(folder: Path, settings: LoraSettings) -> Iterator[tuple[Any, Mapping[str, tuple[int, ...]]]]:
    """Open the adapter's safetensors file; yields it and the shape of each tensor. Reads the header only.

    Raises:
        AdapterError: it is missing or damaged, or a tensor is not a float matrix of the settings' rank.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_WEIGHTS
    check_file(path, _MAX_WEIGHTS_BYTES)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file, {name: _check_tensor(path, name, file.get_slice(name), settings) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise AdapterError(f"{path} is not a complete safetensors file ({error}): copy the adapter again.") from error


def hash_weights_and_settings(folder: Path) -> str:
    """Return the SHA-256 over an adapter's weights and settings in hex.

    Raises:
        AdapterError: one of them is missing.
    """
    digest = hashlib.sha256()
    try:
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            if (folder / name).exists() and not (folder / name).is_file():  # reading a pipe would not end
                raise AdapterError(f"{folder / name} is not a regular file: copy the adapter's own files.")
            with (folder / name).open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
    except OSError as error:
        raise AdapterError(
            f"{error.filename} is missing or cannot be read ({error.strerror}): expected an adapter folder as `finlora train` "
            "writes it."
        ) from error
    return digest.hexdigest()


def check_adapter(folder: Path) -> LoraSettings:
    """Check all that needs no base: the adapter's settings, its shapes, and that all numbers are finite.

    Raises:
        AdapterError: says what is wrong.
    """
    settings = read_lora_settings(folder)
    with open_weights(folder, settings) as (file, shapes):
        for name in shapes:
            require_finite(file.get_tensor(name), folder, name)
    return settings


def find_sites(
    folder: Path, settings: LoraSettings, shapes: Mapping[str, tuple[int, ...]], base: LlamaShape
) -> list[UpdateSite]:
    """Return the base's projections that the adapter updates. The file must hold exactly the tensors of its settings.

    Args:
        shapes: of the file's tensors, as `open_weights` yields them.

    Raises:
        AdapterError: a tensor is missing, matches no projection, or has another shape than its projection.
    """
    sites = list(list_sites(base, settings.target_modules))
    wanted = {name for site in sites for name in site.names}
    if settings.dora:
        wanted |= {magnitude_name(site.projection, site.layer) for site in sites}
    extra = shapes.keys() - wanted
    if extra or not sites:
        raise AdapterError(
            f"{folder} has {len(extra)} tensors that no layer of the base takes{_example(extra)}: expected LoRA pairs on "
            f"{', '.join(settings.target_modules) or 'some projection'} of {base.num_layers} layers."
        )
    if missing := wanted - shapes.keys():
        raise AdapterError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} tensors that its {ADAPTER_CONFIG} asks for on this base"
            f"{_example(missing)}: its file is incomplete, or it was made for another base."
        )
    for site in sites:
        down, up = (shapes[name] for name in site.names)
        num_out, num_in = site.projection.size(base)
        if down[1] != num_in or up[0] != num_out:
            raise AdapterError(
                f"{folder} has {site.projection.path(site.layer)} as {list(up)} x {list(down)}, the base's is "
                f"{num_out} x {num_in}: it was made for another base."
            )
        if settings.dora and (found := shapes[magnitude_name(site.projection, site.layer)]) != (num_out,):
            raise AdapterError(
                f"{folder} has {site.projection.path(site.layer)} with row lengths {list(found)}, the base's has {num_out} rows: "
                "it was made for another base."
            )
    return sites


def require_finite(tensor: Any, folder: Path, name: str) -> None:
    """Refuse infinities and NaN, which would turn every answer of the adapter into NaN.

    Raises:
        AdapterError: names the tensor.
    """
    if not bool(tensor.isfinite().all()):
        raise AdapterError(f"{folder} holds infinite numbers or NaN in {show(name)[1:-1]}: train the adapter again.")


def _example(names: Set[str]) -> str:
    return f", such as {show(min(names))[1:-1]}" if names else ""


def _check_tensor(path: Path, name: str, held: Any, settings: LoraSettings) -> tuple[int, ...]:
    shape, dtype = tuple(held.get_shape()), str(held.get_dtype())
    if settings.dora and is_magnitude(name):
        if len(shape) != 1 or dtype not in _DTYPES:
            raise AdapterError(
                f"{path} holds {show(name)[1:-1]} as {dtype} {list(shape)}: expected a vector of row lengths in floating point."
            )
        return shape
    axis, rank = rank_axis(name), settings.rank_of(adapted_name(name))
    if axis is None or len(shape) != 2 or shape[axis] != rank or dtype not in _DTYPES:
        raise AdapterError(
            f"{path} holds {show(name)[1:-1]} as {dtype} {list(shape)}: expected lora_A ({rank}, in) and lora_B "
            f"(out, {rank}) in floating point, for the rank that {ADAPTER_CONFIG} says."
        )
    return shape
