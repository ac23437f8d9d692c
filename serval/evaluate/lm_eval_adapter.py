"""lm-evaluation-harness (extra `eval`): its tasks on a Serval model, with any cache layout.

    results = evaluate_tasks(llm, ["hellaswag"], kv="int8", limit=100)

The tasks' data sets are lm-eval's own business: it downloads them, or reads them from its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from serval.engine.llm import LLM
from serval.engine.params import SamplingParams
from serval.errors import ConfigError, MissingExtraError
from serval.evaluate.perplexity import Window, pack
from serval.evaluate.scorer import Scorer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingExtraError("lm-eval", "eval") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from serval.models.decoder import Decoder

_BATCH_TOKENS = 4096


class ServalLM(TemplateLM):
    """lm-eval's model interface over an engine and the decoder it runs.

    kv: cache layout through which log-likelihoods are computed (None: exact attention); generation
    uses the engine's own.
    """

    def __init__(self, llm: LLM, decoder: Decoder, tokenizer: Any, kv: str | None = None) -> None:
        super().__init__()
        self.llm, self.tokenizer = llm, tokenizer
        self.scorer = Scorer(decoder, kv)
        self.max_length = decoder.config.max_position_embeddings
        self.max_gen_toks = min(256, self.max_length // 2)
        ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, *decoder.config.eos_token_ids()]
        known = [token for token in ends if token is not None]
        if not known:
            raise ConfigError("the tokenizer has neither a BOS nor an EOS token; lm-eval needs one")
        self._prefix = known[0]

    @property
    def eot_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "serval")).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids. None adds special tokens unless the string already begins with the BOS."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        encoded = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        return encoded["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log p(continuation), whether each of its tokens is the most likely one)."""
        windows = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation][-self.max_length :]
            windows.append(Window(tokens, max(1, len(tokens) - len(continuation))))
        results: list[tuple[float, bool]] = []
        for batch in pack(windows, _BATCH_TOKENS):
            sums, greedy = [0.0] * len(batch), [True] * len(batch)
            for n, first, logits in self.scorer.logits([w.tokens for w in batch]):
                window = batch[n]
                skip = max(0, window.scored_from - 1 - first)
                targets = window.tokens[first + skip + 1 : first + len(logits) + 1]
                if targets:
                    rows = logits[skip : skip + len(targets)]
                    wanted = torch.tensor(targets, device=rows.device)
                    chosen = rows.log_softmax(-1).gather(1, wanted[:, None])
                    sums[n] += chosen.double().sum().item()
                    greedy[n] &= bool((rows.argmax(-1) == wanted).all())
            results += zip(sums, greedy, strict=True)
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(value for value, _ in self._loglikelihood_tokens(parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            sampling = _sampling(dict(options), self.max_gen_toks)
            room = self.max_length - (sampling.max_tokens or 0)
            prompts.append(self.tok_encode(context)[-room:])
            params.append(sampling)
        texts = [output.outputs[0].text for output in self.llm.generate(prompts, params)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def evaluate_tasks(
    llm: LLM,
    decoder: Decoder,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    kv: str | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks; {task: {metric: value}}. Raises ConfigError when a task cannot run."""
    from lm_eval import simple_evaluate

    model = ServalLM(llm, decoder, tokenizer, kv)
    try:
        found = simple_evaluate(model, tasks=list(tasks), limit=limit, log_samples=False)
    except Exception as error:  # unknown names, data sets that cannot be fetched: many types
        raise ConfigError(f"lm-eval could not run {', '.join(tasks)}: {error}") from error
    results = (found or {}).get("results", {})
    return {
        task: {k: v for k, v in values.items() if isinstance(v, (int, float))}
        for task, values in results.items()
    }


def _sampling(options: dict[str, Any], default_tokens: int) -> SamplingParams:
    """lm-eval's generation options, in Hugging Face's words, as SamplingParams."""
    until = options.get("until") or []
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    return SamplingParams(
        temperature=temperature,
        top_p=float(options.get("top_p", 1.0)),
        top_k=int(options.get("top_k", 0)),
        max_tokens=int(options.get("max_gen_toks", default_tokens)),
        stop=[until] if isinstance(until, str) else [s for s in until if s],
    )
