"""A decoder block as recipes see it: its matrices, what they read, and where scales can be folded.

Block
  sites: where linears read, in order of evaluation (`serval.compress.sites`)
    site.inputs: what is read there: one tensor; for experts one per expert
      input.matrices: the linears that read it
      input.statistics: what calibration saw of it
    site.fold(s): divides the input's channels by s, multiplies its readers' columns by s
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from serval.compress.expert_views import take_experts_apart
from serval.compress.scheme import WeightScheme
from serval.compress.sites import InputSite, input_sites
from serval.compress.statistics import (
    InputStatistics,
    Wanted,
    merged_abs_max,
    merged_abs_mean,
)
from serval.errors import ConfigError


@dataclass(eq=False)
class Matrix:
    """One linear of the checkpoint.

    name: of the linear in the checkpoint, without ".weight". path: in the block's module. linear:
    holds the float32 weight [N, K]; changing it in place changes the model. scheme: how it is to be
    stored, which a recipe's `prepare_block` may replace (None: it stays in float, `why_kept` says
    why). scale_dtype: the dtype scales are stored in. input: what it reads (None: nothing calls
    it, its weight is read directly).
    """

    name: str
    path: str
    linear: nn.Linear
    scheme: WeightScheme | None = None
    why_kept: str = ""
    scale_dtype: torch.dtype = torch.float32
    input: LinearInput | None = None

    @property
    def weight(self) -> Tensor:
        """float32 [N, K], detached."""
        return self.linear.weight.detach()

    @property
    def statistics(self) -> InputStatistics | None:
        """What calibration saw of its input; None when it saw nothing."""
        seen = None if self.input is None else self.input.statistics
        return seen if seen is not None and seen.count else None


@dataclass(eq=False)
class LinearInput:
    """A tensor [T, K] read by one or several linears (q, k and v; gate and up)."""

    matrices: list[Matrix]
    statistics: InputStatistics | None = None

    def __post_init__(self) -> None:
        for matrix in self.matrices:
            matrix.input = self

    @property
    def width(self) -> int:
        """K."""
        return self.matrices[0].linear.in_features


@dataclass(eq=False)
class Site:
    """A place where linears read.

    name: the checkpoint's name of the norm, or of the linear or stack of experts, whose input this
    is. place: what produces the input and all that reads it, routers included. inputs: what is
    read; several with a mixture of experts. stage: sites of one stage do not feed each other.
    dtype: in which norms are stored.
    """

    name: str
    place: InputSite
    inputs: list[LinearInput]
    stage: int
    dtype: torch.dtype = torch.float32

    @property
    def matrices(self) -> list[Matrix]:
        """All linears that read here."""
        return [matrix for part in self.inputs for matrix in part.matrices]

    @property
    def statistics(self) -> list[InputStatistics]:
        """Of the inputs that calibration reached."""
        seen = [part.statistics for part in self.inputs if part.statistics is not None]
        return [part for part in seen if part.count]

    @property
    def abs_max(self) -> Tensor | None:
        """float32 [K] over all its inputs; None when calibration saw none."""
        return merged_abs_max(self.statistics) if self.statistics else None

    @property
    def abs_mean(self) -> Tensor | None:
        """float32 [K] over all its inputs; None when calibration saw none."""
        return merged_abs_mean(self.statistics) if self.statistics else None

    def fold(self, scale: Tensor) -> None:
        """Divide the channels by `scale` [K] where they are made and multiply every reader's
        columns by it: the block computes the same. Statistics follow. Before a norm the scale is
        adjusted so that its gain, which is stored in `dtype`, needs no rounding. Raises ConfigError
        when nothing can absorb it or a scale is not positive and finite."""
        if not self.place.foldable:
            raise ConfigError(f"the inputs of {self.name!r} cannot be scaled: {self.place.stuck}")
        scale = scale.detach().float()
        valid = torch.isfinite(scale) & (scale > 0)
        if scale.shape != (self.place.width,) or not valid.all():
            raise ConfigError(
                f"scales for the inputs of {self.name!r} must be {self.place.width} positive "
                f"numbers, got {int(valid.sum())} of {scale.numel()}"
            )
        if self.place.norm is not None:
            gain = self.place.norm.weight.detach()
            stored = (gain / scale).to(self.dtype).float()
            scale = torch.where(stored == 0, scale, gain / stored)
        self.place.fold(scale)
        for part in self.inputs:
            if part.statistics is not None:
                part.statistics.rescale(scale)


@dataclass(eq=False)
class BlockData:
    """Calibration samples of one block, for recipes that look at its output.

    inputs: float32 [T, D] per sample, as the quantised blocks before produce them. targets:
    float32 [T, D] per sample, what this block gives in the float model. run(x, weights) computes
    the block on one sample with activations rounded as the schemes say (gradients pass straight
    through); `weights` replaces matrices by their `path`, and gradients flow into it.
    """

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    run: Callable[..., Tensor]


@dataclass(eq=False)
class Block:
    """One decoder block, in float32. index: its layer. name: in the checkpoint.

    matrices: every linear in it, also those that stay in float. data: set for recipes with
    `wants_data`.
    """

    index: int
    name: str
    module: nn.Module
    sites: list[Site]
    matrices: list[Matrix]
    data: BlockData | None = None

    @property
    def inputs(self) -> Iterator[LinearInput]:
        """Every distinct input, in order of evaluation."""
        for site in self.sites:
            yield from site.inputs

    def stages(self) -> list[list[Site]]:
        """Sites that can be observed together, in order of evaluation."""
        return [list(group) for _, group in groupby(self.sites, key=lambda site: site.stage)]

    def observe(self, wanted: frozenset[Wanted], sites: list[Site] | None = None) -> Observation:
        """Gather fresh statistics of the inputs of `sites` (None: all) while the returned context
        is open and the block runs."""
        chosen = self.sites if sites is None else sites
        return Observation([part for site in chosen for part in site.inputs], wanted)


class Observation:
    """Hooks on one linear of each input; a context manager."""

    def __init__(self, inputs: list[LinearInput], wanted: frozenset[Wanted]) -> None:
        self.inputs, self.wanted = inputs, wanted

    def __enter__(self) -> Observation:
        self.hooks = []
        for part in self.inputs:
            part.statistics = InputStatistics(part.width, self.wanted)
            hook = _updater(part.statistics)
            self.hooks.append(part.matrices[0].linear.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _updater(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def update(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        statistics.update(arguments[0])

    return update


def find_block(module: nn.Module, index: int, rename: Callable[[str], str]) -> Block:
    """The block `module`, layer `index`; `rename` gives checkpoint names of decoder paths. Stacks
    of experts in it are taken apart (`take_experts_apart`)."""
    prefix = f"layers.{index}"
    places = list(input_sites(module))
    take_experts_apart(module)
    matrices = find_matrices(module, prefix, rename)
    sites: list[Site] = []
    stage = 0
    for place in places:
        feeds_from_last = bool(sites) and (place.norm is not None or _ends_attention(place))
        first_inside = bool(sites) and sites[-1].place.norm is not None
        if feeds_from_last or first_inside:
            stage += 1
        inputs = [LinearInput([matrices[path] for path in paths]) for paths in _inputs(place)]
        sites.append(Site(rename(f"{prefix}.{place.name}"), place, inputs, stage))
    return Block(index, rename(prefix), module, sites, list(matrices.values()))


def find_matrices(
    module: nn.Module, prefix: str, rename: Callable[[str], str]
) -> dict[str, Matrix]:
    """Every linear in `module`, the decoder's part `prefix`, by its path in it. Stacks of experts
    must have been taken apart."""
    return {
        path: Matrix(_checkpoint_name(prefix, path, rename), path, linear)
        for path, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    }


def _ends_attention(place: InputSite) -> bool:
    return place.name.endswith("o_proj")


def _inputs(place: InputSite) -> list[list[str]]:
    """Paths of the linears that read one tensor, for each tensor that is read at `place`."""
    together: list[str] = []
    apart: list[list[str]] = []
    for reader in place.readers:
        owner, inside, leaf = reader.name.rpartition(".experts.")
        if not reader.quantised:
            continue
        if inside:
            leaves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else ["down_proj"]
            count = reader.weight.shape[0]
            apart += [[f"{owner}.experts.{e}.{name}" for name in leaves] for e in range(count)]
        else:
            together.append(reader.name)
    return [*([together] if together else []), *apart]


def _checkpoint_name(prefix: str, path: str, rename: Callable[[str], str]) -> str:
    owner, inside, rest = path.partition(".experts.")
    if inside:  # families name the stack; experts in it are named by index and projection
        return f"{rename(f'{prefix}.{owner}.experts')}.{rest}"
    return rename(f"{prefix}.{path}")
