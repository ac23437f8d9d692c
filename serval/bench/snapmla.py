"""SnapMLA: errors of its configurations, what they cost a trained model, and decode attention.

Three groups of cases:

- `errors-CONFIG-REGIME-ctxL`: errors of attention outputs on synthetic latents at DeepSeek-V3's
  shape (16 heads), see `serval.bench.snapmla_errors`. No timing.
- `model-CONFIG`, `model-CONFIG-rope50`, `-rope1e6`: the shipped MLA model on held-out text:
  perplexity, KL(full || this) of next-token distributions and the share of equal most likely
  tokens, when every token attends through the configuration, in FP8 all along as decode steps do.
  `snapmla`, `a` and `b` read the paged cache layout, `c` and `d` see the whole text at once.
  `rope50`, `rope1e6`: the same function with rotary keys so many times larger and rotary queries as
  much smaller.
- `attention-hH-ctxL`: seconds of one decode step of one sequence at DeepSeek-V3's layer shape (512
  latent and 64 rotary dims, H heads: 16 is a share of 8-way tensor parallelism, 128 all), against
  our own float32 and bfloat16 latent caches, and torch's scaled dot-product attention over the
  absorbed form, where the rows serve as keys and as values. Floor: the stored bytes, read once, at
  the bandwidth measured just before and after (the larger). `of_float32_roof`: products per second
  over those of float32 multiply-adds; above 1 where the CPU multiplies bfloat16 faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from serval import kernels
from serval.bench.harness import Case, Contestant, Outcome, Setup, compare, paired_rounds
from serval.bench.kv import RESERVE, timed
from serval.bench.machine import memory_bytes
from serval.bench.quality import RememberedScorer
from serval.bench.snapmla_errors import (
    CONFIGS,
    DEEPSEEK,
    REGIMES,
    CodedDecoder,
    errors,
    rescale_rotary_,
)
from serval.evaluate import perplexity
from serval.evaluate.pipeline import EvalOptions, Evaluator
from serval.evaluate.scorer import Scorer
from serval.evaluate.shipped import shipped_model
from serval.kernels import pages
from serval.kernels.bandwidth import float32_roof, measure_read_bandwidth
from serval.models import checkpoint
from serval.models.attention import AttentionSpec

PAGE = 64
CHUNK = 4096  # tokens stored at a time
TINY = AttentionSpec("mla", 4, 1, 48, 32, kv_lora_rank=64, qk_rope_head_dim=16)
MODEL = "assets/serval-tiny-mla"
FACTORS = {"": 1.0, "-rope50": 50.0, "-rope1e6": 1e6}  # of rotary keys
ALL_FP8 = "fp8_queries=1000000"  # prompts too


def collect(setup: Setup) -> list[Case]:
    """All cases of the module's text."""
    return [*_errors(setup), *_model(setup), *_attention(setup)]


def _errors(setup: Setup) -> list[Case]:
    spec = TINY if setup.quick else DEEPSEEK
    contexts = (65,) if setup.quick else (64, 65, 1000, 4096)
    cases = []
    for regime in REGIMES:
        for context in contexts:
            for config in CONFIGS:
                name = f"errors-{config}-{regime}-ctx{context}"
                if setup.wants(name):
                    found = errors(config, regime, context, spec, 2 if setup.quick else 8)
                    cases.append(Case(name, None, metrics=found))
                    setup.note(f"{name}: relative L2 {found['relative_l2']:.4f}")
    return cases


def _model(setup: Setup) -> list[Case]:
    names = {
        (config, factor): f"model-{config}{suffix}"
        for suffix, factor in FACTORS.items()
        for config in ("full", *CONFIGS)
    }
    wanted = {key: name for key, name in names.items() if setup.wants(name)}
    if not wanted:
        return []
    source = shipped_model(MODEL)
    tokens, window = (256, 128) if setup.quick else (16384, 512)
    windows = Evaluator(EvalOptions(source, text_tokens=tokens, window=window, tasks=())).windows
    decoder = checkpoint.load(source, dtype=torch.float32).eval()
    exact = RememberedScorer(decoder)
    models = {1.0: decoder}
    cases = []
    for (config, factor), name in wanted.items():
        if factor not in models:
            models[factor] = checkpoint.load(source, dtype=torch.float32).eval()
            rescale_rotary_(models[factor], factor)
        model = models[factor]
        if config == "full":
            scorer = Scorer(model)
        elif config in ("c", "d"):
            scorer = Scorer(CodedDecoder.of(model, config))
        else:
            scorer = Scorer(model, f"snapmla:config={config},{ALL_FP8}")
        text = perplexity.score(scorer, windows, reference=exact)
        assert text.kl is not None
        assert text.reference_perplexity is not None
        metrics = {
            "config": config,
            "factor": factor,
            "perplexity": text.perplexity,
            "perplexity_change": text.perplexity / text.reference_perplexity - 1,
            "kl": text.kl,
            "same_top": text.same_top,
        }
        cases.append(Case(name, None, metrics=metrics))
        setup.note(f"{name}: perplexity {text.perplexity:.4f}, KL {1e3 * text.kl:.3f} mnats")
    return cases


def _attention(setup: Setup) -> list[Case]:
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    heads: tuple[int, ...] = (16, 128)
    rounds, spec = 5, DEEPSEEK
    if setup.quick:
        contexts, heads, rounds, spec = (200,), (4,), 1, TINY
    cases: list[Case] = []
    for context in contexts:
        for count in heads:
            name = f"attention-h{count}-ctx{context}"
            if setup.wants(name):
                setup.note(name)
                cases += _timing(setup, name, spec, count, context, rounds)
    return cases


def _timing(
    setup: Setup, name: str, spec: AttentionSpec, heads: int, context: int, rounds: int
) -> list[Case]:
    width = spec.kv_lora_rank + spec.qk_rope_head_dim
    needed = context * (width * 14 + 8) + RESERVE  # four caches and chunks of what they hold
    if needed > memory_bytes():
        why = f"does not fit in memory: {needed / 2**30:.1f} GiB are needed"
        return [Case(name, None, failed=why)]
    readers, widths = make_readers(spec, heads, context)
    before = 0.0 if setup.quick else measure_read_bandwidth(torch.get_num_threads())
    outcomes = paired_rounds(
        [Contestant(label, timed(read)) for label, read in readers.items()], rounds, setup.note
    )
    bandwidth = None
    if not setup.quick:
        bandwidth = max(before, measure_read_bandwidth(torch.get_num_threads()))
    operations = 2 * context * heads * (2 * spec.kv_lora_rank + spec.qk_rope_head_dim)
    pairs = [("snapmla", peer) for peer in list(readers)[1:]]
    pairs += [("full", "torch SDPA float32"), ("bf16", "torch SDPA bfloat16")]
    cases = []
    for ours, peer in pairs:
        metrics = _metrics(outcomes[ours], widths[ours], context, operations, bandwidth)
        floor = None if bandwidth is None else widths[ours] * context / (bandwidth * 1e9)
        cases.append(
            compare(
                name if ours == "snapmla" else f"{ours}-{name}", outcomes[ours], outcomes[peer],
                floor_seconds=floor, metrics=metrics,
            )
        )  # fmt: skip
    return cases


def _metrics(
    ours: Outcome, width: int, context: int, operations: int, bandwidth: float | None
) -> dict[str, float]:
    metrics: dict[str, float] = {"bytes_per_token": width}
    if bandwidth is not None:
        metrics["read_gb_per_s"] = bandwidth
    if ours.samples:
        metrics["gb_per_s"] = width * context / ours.seconds / 1e9
        metrics["gflop_per_s"] = operations / ours.seconds / 1e9
        roof = float32_roof() if bandwidth is not None else 0.0
        if roof:
            metrics["of_float32_roof"] = metrics["gflop_per_s"] / roof
    return metrics


def make_readers(
    spec: AttentionSpec, heads: int, context: int
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """Decode attention of one query over `context` tokens, [1, H, C] each, ours first; and the
    bytes of a token in our caches."""
    random = torch.Generator().manual_seed(0)
    rank, rope = spec.kv_lora_rank, spec.qk_rope_head_dim
    blocks = -(-context // PAGE)
    latent = torch.randn(CHUNK, rank, generator=random)
    k_rope = 10 * torch.randn(CHUNK, rope, generator=random)
    q = 0.3 * torch.randn(1, heads, rank, generator=random)
    q_rope = 0.03 * torch.randn(1, heads, rope, generator=random)
    scale = (spec.head_dim) ** -0.5
    table = torch.arange(blocks, dtype=torch.int32)[None]
    lens = torch.tensor([context], dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    codes = pages.zeros(blocks, PAGE, rank, dtype=torch.uint8)
    scales = pages.zeros(blocks, PAGE, dtype=torch.float32)
    aligned = pages.zeros(blocks, PAGE, rope, dtype=torch.bfloat16)
    dtypes = {"full": torch.float32, "bf16": torch.bfloat16}
    rows = {kv: pages.zeros(blocks, PAGE, rank + rope, dtype=d) for kv, d in dtypes.items()}
    for first in range(0, context, CHUNK):
        count = min(CHUNK, context - first)
        kernels.write_snapmla(
            latent[:count], k_rope[:count], torch.arange(first, first + count),
            codes, scales, aligned,
        )  # fmt: skip
        both = torch.cat([latent[:count], k_rope[:count]], 1)
        for cache in rows.values():
            cache.view(-1, rank + rope)[first : first + count] = both

    def coded() -> Tensor:
        return kernels.snapmla_attention(
            q, q_rope, codes, scales, aligned, table, lens, starts, scale
        )[0]

    def plain(kv: str) -> Callable[[], Tensor]:
        return lambda: kernels.paged_latent_attention(
            q, q_rope, rows[kv], table, lens, starts, scale
        )

    def torch_sdpa(kv: str) -> Callable[[], Tensor]:
        stored = rows[kv].view(1, 1, -1, rank + rope)[:, :, :context]
        query = torch.cat([q, q_rope], -1).to(stored.dtype)[None]  # heads as rows: one key head

        def read() -> Tensor:
            with torch.inference_mode():
                o = F.scaled_dot_product_attention(query, stored, stored, scale=scale)
            return o[0, ..., :rank]

        return read

    readers: dict[str, Callable[[], Tensor]] = {"snapmla": coded}
    for kv, dtype in dtypes.items():
        readers[kv] = plain(kv)
        readers[f"torch SDPA {str(dtype).removeprefix('torch.')}"] = torch_sdpa(kv)
    widths = {kv: (rank + rope) * dtype.itemsize for kv, dtype in dtypes.items()}
    return readers, {"snapmla": rank + 4 + 2 * rope, **widths}
