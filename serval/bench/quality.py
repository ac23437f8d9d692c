"""What compressed models are measured with: held-out text, questions, the float model's outputs.

A yardstick is made once per model; every compressed version then reads the same windows and answers
the same questions, so that small differences are not differences of the sample.

    perplexity, KL(float || compressed) in nats per token, share of equal most likely tokens:
        see `serval.evaluate.perplexity`
    retrieval: share of right answers, with greedy decoding, see `recall.py`
    layer error: mean over decoder layers of |D'(x) - D(x)| / |D(x)|, where D(x) is what a layer
        adds to the residual stream x of the float model, and D' the compressed layer's addition for
        the same x

The layer error compares whole layers and not single matrices, because recipes that fold scales into
norms and neighbouring matrices change what each matrix reads, but not what a layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from serval.bench.recall import answer, make_questions
from serval.data.synthetic import Filler
from serval.evaluate import perplexity
from serval.evaluate.pipeline import EvalOptions, Evaluator
from serval.evaluate.scorer import Rows, Scorer
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder


@dataclass(frozen=True)
class Effort:
    """How much is measured. text_tokens: held-out tokens scored; window: tokens of one window.
    tasks: what is asked, in contexts of half the model's context, `context_tokens` of each task,
    with at most `questions` questions each. layer_tokens: tokens at which layers are compared."""

    text_tokens: int = 8192
    window: int = 512
    tasks: Sequence[str] = ("multi_needle", "key_value", "mqar", "variables")
    context_tokens: int = 2048
    questions: int = 24
    layer_tokens: int = 1024


@dataclass(frozen=True)
class Quality:
    """What was measured of one model; kl, same_top and layer_error against the float model."""

    perplexity: float
    kl: float
    same_top: float
    retrieval: float
    layer_error: float


class Yardstick:
    """The measures of one model's compressed versions. directory: the float checkpoint."""

    def __init__(self, directory: Path, effort: Effort) -> None:
        evaluator = Evaluator(
            EvalOptions(directory, text_tokens=effort.text_tokens, window=effort.window, tasks=())
        )
        self.windows = evaluator.windows
        self.tokenizer = tokenizer = evaluator.tokenizer

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        length = min(evaluator.context // 2, effort.context_tokens)
        self.questions = make_questions(
            effort.tasks,
            Filler(evaluator.texts, encode),
            length=length,
            contexts=effort.context_tokens // length,
            questions=effort.questions,
        )
        self.decoder = checkpoint.load(directory, dtype=torch.float32).eval()
        self.reference = RememberedScorer(self.decoder)
        sequences = [window.tokens for window in self.windows]
        ends = list(accumulate(map(len, sequences)))
        count = 1 + sum(end < effort.layer_tokens for end in ends[:-1])
        self.layers = LayerOutputs.of(self.decoder, sequences[:count])

    def measure(self, decoder: Decoder) -> Quality:
        """Measure `decoder`, a version of the float model with the same vocabulary and layers."""
        decoder.eval()
        text = perplexity.score(Scorer(decoder), self.windows, reference=self.reference)
        assert text.kl is not None
        assert text.same_top is not None
        return Quality(
            perplexity=text.perplexity,
            kl=text.kl,
            same_top=text.same_top,
            retrieval=answer(decoder, self.tokenizer, self.questions),
            layer_error=self.layers.mean_error(decoder),
        )


class RememberedScorer(Scorer):
    """Logits that are computed once per batch of sequences and then kept."""

    def __init__(self, decoder: Decoder, chunk: int = 256) -> None:
        super().__init__(decoder, chunk=chunk)
        self._kept: dict[tuple[tuple[int, ...], ...], list[Rows]] = {}

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Rows]:
        """As `Scorer.logits`."""
        key = tuple(tuple(tokens) for tokens in sequences)
        if key not in self._kept:
            self._kept[key] = list(super().logits(sequences))
        return iter(self._kept[key])


@dataclass
class LayerOutputs:
    """What entered each layer of the float model, and what the layer added to it.

    batch, rotary: of the recorded tokens. inputs: per layer (last branch [T, D], residual stream
    [T, D] or None), as layers take them; added: per layer [T, D].
    """

    batch: PackedBatch
    rotary: tuple[Tensor, Tensor]
    inputs: list[tuple[Tensor, Tensor | None]]
    added: list[Tensor]

    @classmethod
    @torch.inference_mode()
    def of(cls, decoder: Decoder, sequences: Sequence[Sequence[int]]) -> LayerOutputs:
        """Record `decoder` reading `sequences`."""
        lengths = [len(tokens) for tokens in sequences]
        device = decoder.norm.weight.device
        flat = torch.tensor([t for tokens in sequences for t in tokens], device=device)
        batch = PackedBatch.from_lengths(lengths, device)
        rotary = decoder.rotary(device)
        inputs, added = [], []
        x: Tensor = decoder.embed_tokens(flat)
        residual: Tensor | None = None
        for layer in decoder.layers:
            inputs.append((x.clone(), None if residual is None else residual.clone()))
            before = _stream(x, residual)
            x, residual = layer(x, residual, batch, rotary)
            added.append(_stream(x, residual) - before)
        return cls(batch, rotary, inputs, added)

    @torch.inference_mode()
    def errors(self, decoder: Decoder) -> list[float]:
        """The relative error of each layer of `decoder`."""
        return [
            self._error(layer, *given, expected)
            for layer, given, expected in zip(decoder.layers, self.inputs, self.added, strict=True)
        ]

    def mean_error(self, decoder: Decoder) -> float:
        """The mean of `errors`."""
        errors = self.errors(decoder)
        return sum(errors) / len(errors)

    def _error(
        self, layer: nn.Module, x: Tensor, residual: Tensor | None, expected: Tensor
    ) -> float:
        before = _stream(x, residual)
        kept = None if residual is None else residual.clone()
        out, stream = layer(x.clone(), kept, self.batch, self.rotary)
        found = _stream(out, stream) - before
        return ((found - expected).norm() / expected.norm()).item()


def _stream(x: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream with the last branch added, as a new tensor."""
    return x.clone() if residual is None else x + residual
