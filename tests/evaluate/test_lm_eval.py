from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

from serval.engine.llm import LLM
from serval.errors import ConfigError
from serval.evaluate import EvalOptions, run
from serval.evaluate.lm_eval_adapter import ServalLM, evaluate_tasks
from serval.models import checkpoint

PAIRS = [
    ("def read(path):", "\n    return path"),
    ("class Reader", ":"),
    ("", "def"),
    ("with open(path) ", "as file"),
    ("x" * 600, " = y"),  # longer than the context: cut from the left
]


def request(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def pair(model):
    """The adapter, and transformers with the same weights and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoder = checkpoint.load(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = ServalLM(LLM(decoder, tokenizer=tokenizer), decoder, tokenizer)
    return ours, AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer


def expected(theirs, context, continuation):
    tokens = [*context, *continuation][-512:]
    with torch.no_grad():
        log_p = theirs(torch.tensor([tokens])).logits[0].log_softmax(-1)
    first = max(1, len(tokens) - len(continuation))
    values = [log_p[i - 1, tokens[i]].item() for i in range(first, len(tokens))]
    greedy = all(log_p[i - 1].argmax() == tokens[i] for i in range(first, len(tokens)))
    return sum(values), greedy


def test_loglikelihood_equals_transformers(pair):
    ours, theirs, tokenizer = pair
    got = ours.loglikelihood([request(*p) for p in PAIRS], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, got, strict=True):
        if context:
            stripped = context.rstrip()
            continuation = context[len(stripped) :] + continuation
            head = tokenizer(stripped)["input_ids"]
            tail = tokenizer(stripped + continuation)["input_ids"][len(head) :]
        else:
            head, tail = [ours.prefix_token_id], tokenizer(continuation)["input_ids"]
        want, want_greedy = expected(theirs, head, tail)
        assert value == pytest.approx(want, abs=2e-3)
        assert greedy == want_greedy


def test_the_most_likely_continuation_is_greedy(pair):
    ours, theirs, tokenizer = pair
    context = tokenizer("def read(path):")["input_ids"]
    with torch.no_grad():
        best = theirs(torch.tensor([context])).logits[0, -1].argmax().item()
    ((_, greedy),) = ours._loglikelihood_tokens([(("a", "b"), context, [best])])
    assert greedy


def test_rolling_loglikelihood_scores_every_token_once(pair):
    ours, theirs, tokenizer = pair
    for text in ("def read(path):\n    return path\n", "x = y\n" * 300):
        (got,) = ours.loglikelihood_rolling([request(text)])
        tokens = tokenizer(text)["input_ids"]
        limit, total, done = 511, 0.0, 0
        while done < len(tokens):  # lm-eval's windows, written out
            end = min(done + limit, len(tokens))
            prefix = [ours.prefix_token_id] if done == 0 else []
            start = 0 if done == 0 else max(0, end - limit - 1)
            total += expected(theirs, prefix + tokens[start:done], tokens[done:end])[0]
            done = end
        assert got == pytest.approx(total, rel=1e-4)


def test_generation_equals_transformers(pair):
    ours, theirs, tokenizer = pair
    prompt = tokenizer("def read(path):", return_tensors="pt")
    with torch.no_grad():
        tokens = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    options = {"until": [], "max_gen_toks": 12}
    (got,) = ours.generate_until([request("def read(path):", options)])
    assert got == text
    stop = text[5:7]
    (cut,) = ours.generate_until([request("def read(path):", {**options, "until": [stop]})])
    assert cut == text[: text.index(stop)]


def test_chat_template_and_results(pair, monkeypatch):
    ours, _, tokenizer = pair
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat).endswith("<|im_start|>assistant\n")
    assert ours.tokenizer_name
    decoder = ours.scorer.decoder

    def fake(model, tasks, limit, log_samples):
        assert isinstance(model, ServalLM)
        if tasks == ["missing"]:
            raise KeyError("missing")
        return {"results": {tasks[0]: {"acc,none": 0.5, "alias": tasks[0]}}}

    monkeypatch.setattr("lm_eval.simple_evaluate", fake)
    assert evaluate_tasks(ours.llm, decoder, tokenizer, ["arc"]) == {"arc": {"acc,none": 0.5}}
    with pytest.raises(ConfigError, match="lm-eval could not run missing"):
        evaluate_tasks(ours.llm, decoder, tokenizer, ["missing"])


def test_the_limit_reaches_lm_eval(model, texts, monkeypatch):
    asked = []

    def fake(model, tasks, limit, log_samples):
        asked.append((tasks, limit))
        return {"results": {tasks[0]: {"acc,none": 0.25}}}

    monkeypatch.setattr("lm_eval.simple_evaluate", fake)
    options = EvalOptions(
        model, text=str(texts), text_tokens=0, tasks=(), lm_eval=["arc"], lm_eval_limit=7
    )
    assert run(options).lm_eval == {"arc": {"acc,none": 0.25}}
    assert asked == [(["arc"], 7)]
