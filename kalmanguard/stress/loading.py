"""A user's model from a file or a factory; no file is ever executed, unless that was asked for."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.stress.subject import LossFn

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: Under which keys a training script keeps the model's own state.
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "module", "params")
_SHAPES = "a model, a plant, or (model, batches), (model, batches, loss_fn) or (model, batches, loss_fn, optimizer)"


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """What a factory or a file gave: a model, and whatever belongs to it."""

    model: nn.Module
    batches: Iterable[Any] | None = None
    held_out: Iterable[Any] | None = None
    loss_fn: LossFn | None = None
    optimizer: Optimizer | None = None


def load(model: str, *, factory: str | None = None, trust_pickle: bool = False) -> Loaded:
    """Load a model by name.

    Parameters
    ----------
    model
        ``module:factory``, whose module is imported and called: it is the user's own code. Or a file with a state dict,
        ``.safetensors`` or ``.pt``, ``.pth``, ``.bin``, ``.ckpt``.
    factory
        For a file: ``module:factory`` that makes the model which the state belongs to.
    trust_pickle
        Unpickle a ``.pt`` file without restriction: whoever made the file can run any code on this machine.

    Raises
    ------
    ConfigurationError
        There is no such file, module or factory; the file holds more than tensors; the state does not fit the model.

    Notes
    -----
    ``.safetensors`` holds no code. Other files go through ``torch.load(weights_only=True)``, which makes tensors and
    plain containers only. A TorchScript archive is a program and is refused.
    """
    if not _is_file(model):
        if trust_pickle:
            raise ConfigurationError("--i-trust-this-pickle is for a file; a factory is called in any case.")
        return made(call(model))
    content = _read(Path(model), trust_pickle=trust_pickle)
    if isinstance(content, nn.Module):
        return Loaded(content)
    if factory is None:
        raise ConfigurationError(
            f"{model} holds the parameters, not the model: say with --factory module:function what makes it."
        )
    loaded = made(call(factory))
    _fill(loaded.model, _state(content, model), model)
    return loaded


def made(value: Any) -> Loaded:
    """Read what a factory returns.

    Raises
    ------
    ConfigurationError
        It is nothing that can be stressed.
    """
    if isinstance(value, nn.Module):
        return Loaded(value)
    if isinstance(value, tuple) and 2 <= len(value) <= 4 and isinstance(value[0], nn.Module):
        batches, loss_fn, optimizer = (*value[1:], None, None)[:3]
        if loss_fn is not None and not callable(loss_fn):
            raise ConfigurationError(f"The factory's third value is a {type(loss_fn).__name__}, not a loss function.")
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise ConfigurationError(f"The factory's fourth value is a {type(optimizer).__name__}, not an optimizer.")
        return Loaded(value[0], batches, None, loss_fn, optimizer)
    if isinstance(getattr(value, "model", None), nn.Module) and hasattr(value, "loader"):
        optimizers = list(getattr(value, "optimizers", ()))
        if len(optimizers) > 1:
            raise ConfigurationError(
                f"{type(value).__name__} trains with {len(optimizers)} optimizers; a stress test needs one model with "
                "one loss. Return (model, batches, loss_fn, optimizer) of the part that you want judged."
            )
        return Loaded(
            value.model,
            value.loader,
            getattr(value, "probe_loader", None),
            getattr(value, "loss_fn", None),
            optimizers[0] if optimizers else None,
        )
    raise ConfigurationError(f"The factory returned a {type(value).__name__}; it must return {_SHAPES}.")


def call(name: str) -> Any:
    """Import ``module:function`` (the working folder counts) and call it without arguments.

    Raises
    ------
    ConfigurationError
        There is no such thing.
    """
    found = resolve(name)
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ConfigurationError(f"{name} cannot be called without arguments: {error}.") from None
    except ValueError:
        pass  # a callable without a signature; the call will tell
    with _working_folder():
        return found()


def resolve(name: str) -> Callable[..., Any]:
    """Import ``module:function``.

    Raises
    ------
    ConfigurationError
        There is no such thing.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigurationError(
            f"{name!r} is neither a file ending in {', '.join(SUFFIXES)} nor module:function, such as mymodels:make."
        )
    try:
        with _working_folder():
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{name} cannot be imported: {error}.") from error
    if not callable(found):
        raise ConfigurationError(f"{name} is a {type(found).__name__}, which cannot be called.")
    function: Callable[..., Any] = found
    return function


@contextmanager
def _working_folder() -> Iterator[None]:
    """Modules of the working folder can be imported inside, as with ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _is_file(name: str) -> bool:
    return name.endswith(SUFFIXES) or Path(name).is_file()


def read_tensors(path: Path) -> Any:
    """Plain containers of tensors from a file of torch's, without executing it.

    Raises
    ------
    ConfigurationError
        The file is missing, damaged, or holds other objects.
    """
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                raise ConfigurationError(
                    f"{path} is a TorchScript archive, which is a program: load it in a factory of your own, or save "
                    "model.state_dict()."
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes the restricted reader raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigurationError(
            f"{path} cannot be read as plain tensors ({reason[:160]}). Nothing else is unpickled: save tensors, as "
            "model.state_dict() has them, or use safetensors. For a model file that you made yourself there is "
            "--i-trust-this-pickle."
        ) from None


def _read(path: Path, *, trust_pickle: bool) -> Any:
    if path.suffix == ".safetensors":
        if trust_pickle:
            raise ConfigurationError(f"{path} is no pickle; leave --i-trust-this-pickle out.")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigurationError(f"{path} is no safetensors file that can be read: {error}.") from None
    if not trust_pickle:
        return read_tensors(path)
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}.")
    warnings.warn(f"{path} is unpickled without restriction: it may run any code, as you have asked.", stacklevel=2)
    return torch.load(path, map_location="cpu", weights_only=False)


def _state(content: Any, name: str) -> dict[str, Tensor]:
    for key in _STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise ConfigurationError(f"{name} holds no tensors by name; save model.state_dict().")
    return state


def _fill(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Load the state; the prefixes that wrappers put before every name are taken off."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(key.startswith(prefix) for key in state) and not any(k.startswith(prefix) for k in model.state_dict()):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = " ".join(lines[1:3]) if len(lines) > 1 else str(error)
        raise ConfigurationError(
            f"{name} does not fit the {type(model).__name__} that the factory makes: {reason[:240]}"
        ) from None
