"""Loading: a decoder without storage is built from the config, then filled tensor by tensor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from serval.errors import CheckpointError, ConfigError
from serval.models.checkpoint.family import Family, Piece
from serval.models.checkpoint.files import list_tensors, locate, read_json
from serval.models.checkpoint.hub_config import HubConfig, read_variants
from serval.models.checkpoint.quantized import CheckpointModule
from serval.models.checkpoint.registry import QUANTIZERS, family_of_hub_config
from serval.models.checkpoint.safetensors_file import StoredTensor, read_into
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder


def load(
    path_or_name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    check_finite: bool = True,
) -> Decoder:
    """Load a checkpoint directory or Hugging Face name as a `Decoder` in eval mode.

    dtype: of the parameters; None means float32 on the CPU and bfloat16 elsewhere. Buffers of the
    router stay float32, the embedding and head of a quantised model bfloat16 if stored so. Each
    tensor is read straight into its parameter, so the peak is the resident size plus one block.
    Raises ConfigError naming a key that is wrong or unsupported, CheckpointError naming a tensor
    that is missing, unexpected, misshapen, of an unusable dtype or (`check_finite`) holds NaN or
    infinity.
    """
    with OpenCheckpoint(path_or_name, dtype, device, check_finite=check_finite) as opened:
        opened.fill()
    return opened.decoder.eval()


class OpenCheckpoint:
    """A checkpoint whose decoder is filled part by part, for work that needs one block at a time.

    decoder: on the meta device until `fill` has reached a part. stored: every tensor of the files.
    tied: whether they hold no output head of its own. Arguments and errors as `load`;
    names and shapes of all tensors are checked when it is opened. A context manager: it holds the
    files open.
    """

    def __init__(
        self,
        path_or_name: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        check_finite: bool = True,
    ) -> None:
        self.directory = locate(path_or_name)
        target = torch.device(device if device is not None else "cpu")
        if dtype is None:
            dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
        self.family, self.decoder, self.stored = _open(self.directory)
        self.tied = self.decoder.lm_head is None
        self._filler = _Filler(self.decoder, self.family, self.stored, dtype, target, check_finite)

    def fill(self, path: str = "", dtype: torch.dtype | None = None) -> None:
        """Read what lies in the decoder's module `path` ("": everything). dtype: of its parameters
        instead of the one given on opening."""
        self._filler.fill(path, dtype)

    def __enter__(self) -> OpenCheckpoint:
        self._filler.open()
        return self

    def __exit__(self, *error: object) -> None:
        self._filler.close()


def _open(directory: Path) -> tuple[Family, Decoder, dict[str, StoredTensor]]:
    values = read_json(directory / "config.json")
    family, config = _read_config(directory, values)
    stored = list_tensors(directory)
    if config.num_hidden_layers > len(stored):  # before building as many modules
        raise CheckpointError(
            f"{directory} holds {len(stored)} tensors; config.json asks for "
            f"{config.num_hidden_layers} layers"
        )
    config = family.fit(config, stored)
    decoder = empty_decoder(config)
    if values.get("quantization_config"):
        _prepare_quantized(decoder, family, values["quantization_config"], stored)
    return family, decoder, stored


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`, which on the meta device would import a compiler: 1.5 s, 150 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def empty_decoder(config: ModelConfig) -> Decoder:
    """A decoder on the meta device: shapes and dtypes without storage."""
    with torch.device("meta"), _NoInitialisation():
        return Decoder(config)


def read_config(path_or_name: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint, without its weights."""
    directory = locate(path_or_name)
    return _read_config(directory, read_json(directory / "config.json"))[1]


def _read_config(directory: Path, values: dict[str, Any]) -> tuple[Family, ModelConfig]:
    values, attention = read_variants(values)
    family = family_of_hub_config(values)
    config = family.read_config(HubConfig(values))
    if attention != config.attention:
        config = dataclasses.replace(config, attention=attention)
    generation = directory / "generation_config.json"
    if generation.exists():  # chat models often stop on more tokens than config.json says
        eos = HubConfig(read_json(generation)).token_ids("eos_token_id")
        if eos is not None:
            config = dataclasses.replace(config, eos_token_id=eos)
    return family, config


def _prepare_quantized(
    decoder: Decoder, family: Family, quantization: Any, stored: dict[str, StoredTensor]
) -> None:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in QUANTIZERS:
        raise ConfigError(
            f"config.json: quantization_config.quant_method is {method!r}; Serval reads "
            f"{', '.join(QUANTIZERS)}, or unquantised weights (dequantise the checkpoint first)"
        )
    quantizer = QUANTIZERS[method].load()()
    rename = lambda name: family.rename(name, decoder.config)  # noqa: E731 a line of its own
    quantizer.prepare(decoder, quantization, rename, stored)
    decoder.quantization_config = quantization


# Large tables that may stay as stored beside wider activations; no row of them gains by widening.
_TABLES = ("embed_tokens.weight", "lm_head.weight")


class _Filler:
    """Fills a decoder on the meta device from the stored tensors."""

    def __init__(
        self,
        decoder: Decoder,
        family: Family,
        stored: dict[str, StoredTensor],
        dtype: torch.dtype,
        device: torch.device,
        check_finite: bool,
    ) -> None:
        self.decoder, self.family, self.stored = decoder, family, stored
        self.config = decoder.config
        self.dtype, self.device, self.check_finite = dtype, device, check_finite
        self.descriptors: dict[Path, int] = {}
        self.files = ExitStack()
        self.quantized: dict[str, CheckpointModule] = {}  # outermost: a stack of experts is one
        for name, module in decoder.named_modules():
            nested = any(name.startswith(f"{outer}.") for outer in self.quantized)
            if isinstance(module, CheckpointModule) and not nested:
                self.quantized[name] = module
        self.plain = [
            (name, owner, leaf)
            for name, owner, leaf in _tensors_of(decoder)
            if not any(name.startswith(prefix + ".") for prefix in self.quantized)
        ]
        self.expected = self._check_names(self.plain, self.quantized)

    def open(self) -> None:
        for path in sorted({self.stored[name].path for name in self.expected}):
            self.descriptors[path] = os.open(path, os.O_RDONLY)
            self.files.callback(os.close, self.descriptors[path])

    def close(self) -> None:
        self.files.close()

    def fill(self, path: str, dtype: torch.dtype | None) -> None:
        dtype = dtype or self.dtype
        for name, owner, leaf in self.plain:
            if _inside(name, path):
                self._fill_tensor(name, owner, leaf, dtype)
        for name, module in self.quantized.items():
            if _inside(name, path):
                self._fill_module(name, module)

    def _check_names(
        self, plain: list[tuple[str, nn.Module, str]], quantized: dict[str, CheckpointModule]
    ) -> set[str]:
        """Compare names and shapes with the files before anything is allocated."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, owner, leaf in plain:
            for piece in self.family.pieces(name, getattr(owner, leaf), self.config):
                shapes[piece.name] = piece.shape
                if len(shapes) > len(self.stored):  # something is missing: config.json may ask
                    break  # for millions of experts
        for name, module in quantized.items():
            prefix = self.family.rename(name, self.config)
            for leaf, (shape, _) in module.checkpoint_spec().items():
                shapes[f"{prefix}.{leaf}"] = tuple(shape)
        missing = [name for name in shapes if name not in self.stored]
        if missing:
            raise CheckpointError(_several("is missing from", missing, self._where()))
        for name, shape in shapes.items():
            found = self.stored[name]
            if found.shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} in {found.path} has shape {list(found.shape)}; config.json "
                    f"implies {list(shape)}"
                )
        copies = self.family.copies(self.config)
        unexpected = [
            name
            for name in self.stored
            if name not in shapes
            and name not in copies
            and not self.family.ignores(name, self.config)
        ]
        if unexpected:
            what = f"has no place in a {self.family.model_type} model of this config.json:"
            raise CheckpointError(_several(what, unexpected, self._where()))
        return set(shapes)

    def _where(self) -> str:
        paths = {stored.path for stored in self.stored.values()}
        return str(next(iter(paths)) if len(paths) == 1 else next(iter(paths)).parent)

    def _fill_tensor(self, name: str, owner: nn.Module, leaf: str, dtype: torch.dtype) -> None:
        old = getattr(owner, leaf)
        is_parameter = isinstance(old, nn.Parameter)
        if not is_parameter or not old.is_floating_point():
            dtype = old.dtype
        elif name in _TABLES and self.decoder.quantization_config is not None:
            found = self.stored[self.family.rename(name, self.config)].dtype
            dtype = found if found == torch.bfloat16 else dtype
        new = torch.empty(old.shape, dtype=dtype, device=self.device)
        for piece in self.family.pieces(name, new, self.config):
            self._read(piece)
        if is_parameter:
            setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            owner.register_buffer(
                leaf, new, persistent=leaf not in owner._non_persistent_buffers_set
            )

    def _fill_module(self, name: str, module: CheckpointModule) -> None:
        prefix = self.family.rename(name, self.config)
        spec = module.checkpoint_spec()

        def read(leaf: str) -> Tensor:
            shape, dtype = spec[leaf]
            tensor = torch.empty(tuple(shape), dtype=dtype)
            self._read(Piece.of(f"{prefix}.{leaf}", tensor))
            return tensor

        try:
            module.load_checkpoint_tensors(_ReadWhenAsked(spec, read), self.device)
        except CheckpointError as error:  # modules name their tensors without the path to them
            text = str(error)
            raise CheckpointError(text if prefix in text else f"{prefix}.{text}") from error

    def _read(self, piece: Piece) -> None:
        stored = self.stored[piece.name]
        if stored.dtype.is_floating_point != piece.view.dtype.is_floating_point or (
            stored.dtype.itemsize == 1 and stored.dtype != piece.view.dtype
        ):
            raise CheckpointError(
                f"tensor {piece.name!r} in {stored.path} has dtype {stored.dtype}; expected one "
                f"that converts to {piece.view.dtype}: dequantise or convert the checkpoint"
            )
        read_into(
            stored,
            piece.view,
            descriptor=self.descriptors[stored.path],
            check=self.check_finite,
        )


class _ReadWhenAsked(Mapping[str, Tensor]):
    """The stored tensors of a module, none of them in memory before it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = list(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _tensors_of(decoder: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter and persistent buffer: full name, owning module, attribute name."""
    for prefix, module in decoder.named_modules():
        leaves = [n for n, p in module.named_parameters(recurse=False) if p is not None]
        leaves += [
            n
            for n, b in module.named_buffers(recurse=False)
            if b is not None and n not in module._non_persistent_buffers_set
        ]
        for leaf in leaves:
            yield (f"{prefix}.{leaf}" if prefix else leaf), module, leaf


def _inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _several(what: str, names: list[str], where: str) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more} {what} {where}"
