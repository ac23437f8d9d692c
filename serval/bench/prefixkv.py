"""Cache policies at equal budgets: what allocation costs in quality, and what a budget frees.

Quality, on the shipped model: held-out texts are cut into a prompt of 768 tokens and a continuation
of 256; after the prompt each policy drops tokens, then the continuation is fed token by token
(decoding holds the shares). Perplexity, and KL divergence and same most likely token against the
whole cache. All policies but `local` use the same importance; they differ in how the budget is
split over layers. `prefixkv-offline` takes its shares from a profile of other texts.
`prefixkv-recent` and `h2o` spend half of each layer's entries on its last tokens: side by side
they differ in allocation only, as `prefixkv` and `uniform` do. Retrieval asks generated questions
whose prompts are cut likewise.

Constructed layers, from flat to steep attention with lasting heavy keys, show what the method is
about where its premise holds: errors of outputs at equal budgets.

Memory and speed, at the Llama-3.2-1B shape with random weights: sequences of 8192 random keys and
values with importances of which some layers' are flat and some steep; blocks in use and seconds of
a decode step at each budget, against the whole cache in turn.

A case `importance` holds the Lorenz curves and Gini coefficients of the shipped model's layers.
`python -m serval.bench.prefixkv_report RESULT.json --picture FILE` draws them.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from serval.bench.harness import Case, Contestant, Sample, Setup, compare, paired_rounds
from serval.bench.machine import memory_bytes
from serval.bench.shapes import SHAPES, fill_parameters
from serval.cache.budgeted import BudgetedMemory, make_memory
from serval.cache.manager import SequenceCache
from serval.cache.memory import PagedMemory, cache_budget, cache_bytes_per_token
from serval.cache.policies import make_policy
from serval.cache.policies.diagnostics import gini, lorenz, retained
from serval.cache.policies.profile import calibrate
from serval.cache.staging import measure_importance
from serval.data.synthetic import Filler
from serval.data.tokenizer import load_tokenizer
from serval.engine.llm import LLM
from serval.evaluate import perplexity, retrieval
from serval.evaluate.cache_profile import draw_samples
from serval.evaluate.scorer import Scorer
from serval.evaluate.shipped import shipped_model
from serval.evaluate.texts import evaluation_texts
from serval.models import checkpoint
from serval.models.decoder import Decoder

POLICIES = {  # name in the report -> policy
    "prefixkv": "prefixkv",
    "prefixkv-offline": "prefixkv",
    "prefixkv-recent": "prefixkv:recent=0.5",
    "prefixkv-queries": "prefixkv:queries=32",
    "uniform-queries": "uniform:queries=32",
    "uniform": "uniform",
    "pyramid": "pyramid",
    "h2o": "h2o",
    "local": "local",
}
KEEPS = (0.1, 0.2, 0.3, 0.5)
TASKS = ("needle", "key_value")
WHOLE = "whole cache"
BLOCK = 32
POINTS = 12  # of a Lorenz curve in the report


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    windows: int = 16
    window: int = 1024
    prompt_share: float = 0.75
    samples: int = 10  # of the profile
    questions: int = 8  # per task
    context: int = 1024  # of a question
    shape: str = "llama-1b"
    sequences: int = 8
    tokens: int = 8192  # of each
    steps: int = 4
    rounds: int = 3


QUICK = Size(2, 160, 0.75, 2, 1, 128, "tiny", 2, 200, 2, 1)


def collect(setup: Setup) -> list[Case]:
    """Every policy at every budget, then memory and speed at every budget."""
    size = QUICK if setup.quick else Size()
    keeps = KEEPS[1:2] if setup.quick else KEEPS
    names = {
        (policy, keep): f"serval-tiny-{policy}-keep{round(100 * keep)}"
        for keep in keeps
        for policy in POLICIES
    }
    wanted = {key for key, name in names.items() if setup.wants(name)}
    cases: list[Case] = []
    importance = setup.wants("importance")
    if wanted or importance:
        quality = Quality(size, setup)
        if importance:
            cases.append(quality.importance_case(keeps))
        cases += [quality.case(names[key], *key) for key in names if key in wanted]
    steep = {keep: f"constructed-layers-keep{round(100 * keep)}" for keep in keeps}
    cases += [steepness_case(name, keep) for keep, name in steep.items() if setup.wants(name)]
    speeds = {keep: f"{size.shape}-decode-keep{round(100 * keep)}" for keep in keeps}
    timed = [keep for keep, name in speeds.items() if setup.wants(name)]
    if timed:
        cases += speed_cases(setup, size, {keep: speeds[keep] for keep in timed})
    return cases


class Quality:
    """The shipped model with the texts and questions that all policies get."""

    def __init__(self, size: Size, setup: Setup) -> None:
        self.size, self.note = size, setup.note
        directory = shipped_model()
        self.decoder = checkpoint.load(directory)
        self.tokenizer: Any = load_tokenizer(directory)
        texts = evaluation_texts(None, directory)
        documents = list(perplexity.tokenize(texts, self.tokenizer))
        long_enough = [text for text in documents if len(text) >= size.window]
        self.samples = draw_samples(long_enough[1::2], size.samples, size.window, seed=1)
        every = perplexity.cut(long_enough[::2], size.window)
        whole = [window for window in every if len(window.tokens) == size.window]
        step = max(1, len(whole) // size.windows)
        chosen = list(islice(whole[::step], size.windows))
        self.windows = perplexity.continuations(chosen, size.prompt_share)
        self.reference = Scorer(self.decoder, chunk=size.window)

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        self.questions = retrieval.make_questions(
            TASKS,
            [size.context],
            Filler(texts, encode),
            samples=max(1, size.questions // 4),
            depths=min(4, size.questions),
            seed=5,
        )
        self._whole: dict[str, float] | None = None
        self._folder = tempfile.TemporaryDirectory()

    def case(self, name: str, policy: str, keep: float) -> Case:
        """One policy at one budget. ours, peer_value: its perplexity and the whole cache's."""
        if self._whole is None:
            self._whole = self._measure(None)
            self.note(f"  {WHOLE}: perplexity {self._whole['perplexity']:.3f}")
        found = self._measure(self._chosen(policy, keep))
        self.note(
            f"  {name}: perplexity {found['perplexity']:.3f}, KL {found['kl']:.4f}, retrieval "
            f"{found['retrieval']:.0%}"
        )
        metrics = {
            "policy": policy,
            "keep": keep,
            **found,
            "whole_perplexity": self._whole["perplexity"],
            "whole_retrieval": self._whole["retrieval"],
            "perplexity_change": found["perplexity"] / self._whole["perplexity"] - 1,
        }
        return Case(name, None, metrics=metrics)

    def _chosen(self, policy: str, keep: float) -> str:
        name, colon, options = POLICIES[policy].partition(":")
        chosen = f"{name}:keep={keep}" + (f",{options}" if colon else "")
        if not policy.endswith("-offline"):
            return chosen
        path = Path(self._folder.name) / f"{keep}.json"
        calibrate(self.decoder, make_policy(chosen), self.samples).write(path)
        return f"{chosen},profile={path}"

    def _measure(self, policy: str | None) -> dict[str, float]:
        size = self.size
        scorer = Scorer(self.decoder, "full", size.window, policy, size.prompt_share)
        text = perplexity.score(
            scorer,
            self.windows,
            reference=self.reference,
            batch_tokens=size.windows * size.window,
        )
        llm = LLM(self.decoder, tokenizer=self.tokenizer, policy=policy, prefix_caching=False)
        cells = retrieval.ask(llm, self.tokenizer, self.questions)
        assert text.kl is not None
        assert text.same_top is not None
        found = {
            "perplexity": text.perplexity,
            "kl": text.kl,
            "same_top": text.same_top,
            "tokens": float(text.tokens),
            "retrieval": retrieval.accuracy(cells),
        }
        for task in TASKS:
            mine = [cell for cell in cells if cell.task == task]
            found[f"retrieval_{task}"] = retrieval.accuracy(mine)
        return found

    def importance_case(self, keeps: tuple[float, ...]) -> Case:
        """Lorenz curves and Gini coefficients per layer, and what PrefixKV and equal budgets retain
        in the worst layer."""
        curves, unequal = [], []
        worst: dict[str, list[float]] = {}
        prompt = int(self.size.window * self.size.prompt_share)
        windows = [spec.window for spec in self.decoder.trunk_attention_layers]
        for window in self.windows:
            scorer = make_policy("prefixkv").scorer
            importance = measure_importance(self.decoder, window.tokens[:prompt], scorer)
            places = torch.linspace(0, prompt, POINTS + 1).round().long()
            curves.append(lorenz(importance)[:, places])
            unequal.append(gini(importance))
            for policy in ("prefixkv", "uniform"):
                for keep in keeps:
                    kept = make_policy(f"{policy}:keep={keep}").allocate(importance, windows)
                    least = float(retained(importance, kept).min())
                    worst.setdefault(f"least_retained_{policy}_{round(100 * keep)}", []).append(
                        least
                    )
        metrics = {
            "gini": [round(x, 4) for x in torch.stack(unequal).mean(0).tolist()],
            "lorenz": [[round(x, 4) for x in row] for row in torch.stack(curves).mean(0).tolist()],
            **{name: sum(values) / len(values) for name, values in worst.items()},
        }
        return Case("importance", None, metrics=metrics)


def steepness_case(name: str, keep: float, tokens: int = 512, layers: int = 8) -> Case:
    """Layers of constructed attention, from flat to steep, whose heavy keys are the same for all
    queries: the relative error of the next queries' outputs, mean and largest over layers."""
    generator = torch.Generator().manual_seed(0)
    heads, dim, new = 4, 32, 32
    scorer = make_policy("prefixkv").scorer
    importance, parts = [], []
    for layer in range(layers):
        weight = 6.0 * layer / (layers - 1)  # spread of the logits
        logits = weight * torch.randn(tokens, generator=generator)
        q = torch.randn(tokens + new, heads, dim, generator=generator) * 0.3
        k = torch.randn(tokens, 1, dim, generator=generator) * 0.3
        q[..., 0], k[:, 0, 0] = 1.0, logits
        v = torch.randn(tokens, dim, generator=generator)
        importance.append(scorer.score(q[:tokens], k, 1.0, 0))
        parts.append((q[tokens:], k[:, 0], v))
    shared = torch.stack(importance)
    windows: list[int | None] = [None] * layers
    metrics: dict[str, Any] = {"keep": keep, "tokens": tokens, "layers": layers}
    for policy in ("prefixkv", "uniform", "pyramid"):
        made = make_policy(f"{policy}:keep={keep},least=0")
        errors = []
        for row, count, (q, k, v) in zip(
            shared, made.allocate(shared, windows), parts, strict=True
        ):
            chosen = made.select(row, count, None)
            scores = torch.einsum("nhd,md->nhm", q, k)
            whole = scores.softmax(-1) @ v
            less = scores[..., chosen].softmax(-1) @ v[chosen]
            errors.append(float((less - whole).norm() / whole.norm()))
        metrics[f"error_{policy}"] = sum(errors) / layers
        metrics[f"largest_error_{policy}"] = max(errors)
    return Case(name, None, metrics=metrics)


def speed_cases(setup: Setup, size: Size, names: dict[float, str]) -> list[Case]:
    """Seconds of a decode step of all sequences at each budget, and of the whole cache."""
    config = SHAPES[size.shape]
    with torch.device("meta"):
        decoder = Decoder(config)
    specs = decoder.trunk_attention_layers
    per_token = cache_bytes_per_token(specs, "full", torch.float32)
    weights = sum(p.numel() for p in decoder.parameters()) * 4
    tokens = size.sequences * (size.tokens + BLOCK)
    needed = weights + per_token * (tokens * (1 + 1.1 * max(names)) + size.tokens) + 2**30
    if needed > memory_bytes():
        why = (
            f"does not fit in memory: {needed / 2**30:.1f} GiB are needed, "
            f"{memory_bytes() / 2**30:.1f} GiB are free"
        )
        return [Case(name, None, WHOLE, failed=why) for name in names.values()]
    setup.note(f"{size.shape}: {size.sequences} sequences of {size.tokens} tokens")
    fill_parameters(decoder.eval())
    peer = DecodeRun(decoder, None, size, reads=len(names))
    whole = peer.filled_bytes
    cases = []
    for keep, name in names.items():
        run = DecodeRun(decoder, keep, size)
        contestants = [Contestant(WHOLE, peer.measure), Contestant(name, run.measure)]
        outcomes = paired_rounds(contestants, size.rounds, setup.note)
        metrics = {
            "keep": keep,
            "sequences": size.sequences,
            "context": size.tokens,
            "blocks_bytes": run.filled_bytes,
            "whole_blocks_bytes": whole,
            "kept_bytes_fraction": run.filled_bytes / whole,
        }
        outcome = outcomes[name]
        if outcome.samples:
            metrics["tokens_per_second"] = size.sequences / outcome.seconds
        cases.append(compare(name, outcome, outcomes[WHOLE], metrics=metrics))
    return cases


class DecodeRun:
    """Sequences with random contents under a budget (None: the whole cache), and their steps.
    reads: how often all rounds are measured."""

    def __init__(self, decoder: Decoder, keep: float | None, size: Size, reads: int = 1) -> None:
        self.decoder, self.size = decoder, size
        specs = decoder.trunk_attention_layers
        policy = None if keep is None else make_policy(f"prefixkv:keep={keep}")
        room = size.tokens + (size.steps + 1) * size.rounds * reads
        blocks = size.sequences * -(-room // BLOCK)
        if keep is not None:
            blocks = int(blocks * keep * 1.1) + 4 * size.sequences
        budget = cache_budget(
            specs, "full", torch.float32, blocks=blocks, block_size=BLOCK, sequences=size.sequences
        )
        self.memory = make_memory(
            decoder,
            "full",
            policy,
            cache_bytes=budget,
            max_model_len=room,
            block_size=BLOCK,
            prefix_caching=False,
            max_sequences=size.sequences,
        )
        generator = torch.Generator().manual_seed(0)
        self.caches = [self._filled(generator) for _ in range(size.sequences)]
        manager = self.memory.manager
        self.filled_bytes = manager.used_blocks * self.memory.nbytes / manager.total_blocks

    @torch.inference_mode()
    def _filled(self, generator: torch.Generator) -> SequenceCache:
        """A sequence of `tokens` random keys and values; layers' importances range from flat to
        steep."""
        memory, count = self.memory, self.size.tokens
        cache = memory.manager.create()
        memory.manager.begin(cache, count)
        memory.manager.append(cache, count)
        memory.batch([cache], [count])
        layers = len(self.decoder.trunk_attention_layers)
        for layer, spec in enumerate(self.decoder.trunk_attention_layers):
            heads, dim = spec.num_key_value_heads, spec.head_dim
            k, v = (torch.randn(count, heads, dim, generator=generator) for _ in range(2))
            if isinstance(memory, BudgetedMemory):
                steepness = 3.0 * layer / max(1, layers - 1)
                cache.staging.put(layer, k, v, torch.rand(count, generator=generator) ** steepness)
            else:
                _write(memory, layer, k, v)
        memory.settle(cache)
        return cache

    @torch.inference_mode()
    def measure(self) -> Sample:
        """Seconds of one step in which every sequence computes a token; the first is a warm-up."""
        tokens = torch.arange(self.size.sequences) % self.decoder.config.vocab_size
        wall = cpu = 0.0
        for step in range(self.size.steps + 1):
            if step == 1:
                wall, cpu = time.perf_counter(), time.process_time()
            for cache in self.caches:
                self.memory.manager.append(cache, 1)
            batch = self.memory.batch(self.caches, [1] * len(self.caches))
            self.decoder.logits(self.decoder(tokens, batch))
        steps = self.size.steps
        return Sample((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)


def _write(memory: PagedMemory, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store the keys and values of the step that `memory` has begun."""
    layout, view = memory.layouts[0], memory.current[0]
    layout.write(layer, view, k, v)
