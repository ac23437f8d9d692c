"""What the loop asks of a data source, and how packed rows become training targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Row = tuple[Tensor, Sequence[int], Tensor | None]


class TokenStream(Protocol):
    """An endless, resumable source of packed rows.

    All ranks of a distributed run read the same stream and keep their share of the rows, so the
    position is one number for the whole run and a run may resume on another number of ranks.
    """

    def next(self) -> Row:
        """Return (tokens int64 [T], document lengths that sum to T, weights float32 [T] | None).

        The weight of a token is its weight as something to be predicted; None means all ones.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain JSON values, from which `next` continues."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position given by `state_dict`."""
        ...


@dataclass
class Targets:
    """Packed rows with what each should predict.

    tokens: int64 [T]. lengths: document lengths. targets: int64 [T], the token to predict.
    weights: float32 [T], its weight in the loss; zero where the document ends.
    """

    tokens: Tensor
    lengths: list[int]
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Targets:
        move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        return Targets(move(self.tokens), self.lengths, move(self.targets), move(self.weights))

    @staticmethod
    def grouped(rows: Sequence[Targets], size: int) -> list[Targets]:
        """Lay every `size` rows end to end; the number of rows must be a multiple of `size`."""
        if size == 1:
            return list(rows)
        return [
            Targets(
                torch.cat([row.tokens for row in group]),
                [length for row in group for length in row.lengths],
                torch.cat([row.targets for row in group]),
                torch.cat([row.weights for row in group]),
            )
            for group in (rows[at : at + size] for at in range(0, len(rows), size))
        ]

    def ahead(self, offset: int) -> Targets:
        """Targets `offset` tokens further ahead (multi-token prediction), inside each document."""
        if offset == 0:
            return self
        weights = _shift(self.weights, offset, 0.0)
        for end in _ends(self.lengths):
            weights[max(0, end - 1 - offset) : end] = 0.0
        return Targets(self.tokens, self.lengths, _shift(self.targets, offset, 0), weights)


def next_token_targets(row: Row) -> Targets:
    """Give every token of a packed row the next token of its document as target."""
    tokens, lengths, loss_weights = row
    lengths = list(lengths)
    if loss_weights is None:
        loss_weights = torch.ones(tokens.shape[0], dtype=torch.float32)
    weights = _shift(loss_weights, 1, 0.0)
    weights[torch.tensor(_ends(lengths)) - 1] = 0.0  # nothing follows a document's last token
    return Targets(tokens, lengths, _shift(tokens, 1, 0), weights)


def _ends(lengths: Sequence[int]) -> list[int]:
    return torch.tensor(list(lengths)).cumsum(0).tolist()


def _shift(values: Tensor, offset: int, fill: float) -> Tensor:
    shifted = torch.full_like(values, fill)
    shifted[:-offset] = values[offset:]
    return shifted
