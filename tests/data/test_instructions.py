"""Fine-tuning data: what is predicted, how rows are packed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serval.data.instructions import Encoder, InstructionStream, read_instructions
from serval.data.tokenizer import CHAT_TEMPLATE
from serval.errors import DataError
from tests.engine.helpers import byte_tokenizer


class Templated:
    """The byte tokenizer with another chat template, <eos> written out by it."""

    def __init__(self, template: str | None) -> None:
        self.inner, self.template = byte_tokenizer(), template
        self.eos_token, self.chat_template = "<eos>", template

    def __call__(self, text: str, **options):
        return self.inner(text, **options)

    def apply_chat_template(self, messages, **options):
        return self.inner.apply_chat_template(messages, chat_template=self.template, **options)


CHATML = CHAT_TEMPLATE.replace("<|im_end|>", "<eos>")
CHAT = {
    "messages": [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "uno"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "dos"},
    ]
}
EOS = 287


def encoder(template: str | None = CHATML, **options) -> Encoder:
    return Encoder(Templated(template), EOS, **options)


def predicted(document) -> list[str]:
    """The runs of predicted tokens, as text."""
    tokens, weights = document
    runs, now = [], []
    for token, weight in [*zip(tokens, weights, strict=True), (0, 0.0)]:
        if weight:
            now.append(token)
        elif now:
            runs.append(byte_tokenizer().decode(now))
            now = []
    return runs


def test_only_what_the_assistant_says_is_predicted() -> None:
    document = encoder().encode(CHAT, "x:1")
    assert predicted(document) == ["uno<eos>", "dos<eos>"]
    text = byte_tokenizer().decode(document[0])
    assert text == Templated(CHATML).apply_chat_template(CHAT["messages"], tokenize=False).rstrip()
    prompt = Templated(CHATML).apply_chat_template(
        CHAT["messages"][:1], add_generation_prompt=True, tokenize=False
    )
    ids = byte_tokenizer()(prompt)["input_ids"]
    assert document[0][: len(ids)] == ids  # the very tokens that the server makes of the prompt
    assert set(encoder(mask_prompt=False).encode(CHAT, "x:1")[1]) == {1.0}


def test_a_template_without_an_end_gets_one_and_one_that_rewrites_history_learns_the_last() -> None:
    document = Encoder(byte_tokenizer(), EOS).encode(CHAT, "x:1")  # "[assistant] uno\n"
    assert predicted(document) == ["uno\n", "dos\n<eos>"]
    forgetful = (
        "{% for m in messages %}[{{ m.role }}] "
        "{{ m.content if m.role == 'user' or loop.last else '...' }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    assert predicted(encoder(forgetful).encode(CHAT, "x:1")) == ["dos<eos>"]
    with pytest.raises(DataError, match="what to predict cannot be told"):
        encoder("{% for m in messages %}{{ m.content }}{% endfor %}!").encode(CHAT, "x:1")


def test_completions() -> None:
    row = {"prompt": "2+2=", "completion": "4"}
    tokens, weights = encoder().encode(row, "x:1")
    assert predicted((tokens, weights)) == ["4<eos>"]
    assert (
        tokens[: -len(predicted((tokens, weights))[0][:1]) - 1]
        == byte_tokenizer()("2+2=")["input_ids"]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "x:7: expected texts 'prompt' and 'completion'.*found: text"),
        ([1], "found: list"),
        ({"prompt": "a", "completion": 3}, "expected texts"),
        ({"messages": []}, "non-empty list"),
        ({"messages": ["hi"]}, "an object with a role"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({"messages": [{"role": "assistant"}]}, "chat template refused"),
    ],
)
def test_rows_that_teach_nothing(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encoder().encode(row, "x:7")


def test_a_conversation_needs_a_template() -> None:
    with pytest.raises(DataError, match=r"data\.chat_template"):
        encoder(None).encode(CHAT, "x:1")


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_splits_are_disjoint_and_cuts_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ", "completion": "y" * i} for i in range(1, 60)]
    path = write(tmp_path / "d.jsonl", [*rows, {"prompt": "p" * 50, "completion": "lost"}])
    both = [read_instructions(path, encoder(), 32, split, 0.3) for split in ("train", "validation")]
    assert sum(len(part.documents) for part in both) == 59
    assert all(part.documents for part in both)
    assert sum(part.dropped for part in both) == 1
    assert sum(part.cut for part in both) > 10
    assert max(len(tokens) for part in both for tokens, _ in part.documents) == 32
    with pytest.raises(DataError, match=r"cannot read .*none.jsonl"):
        read_instructions(tmp_path / "none.jsonl", encoder(), 32)
    (tmp_path / "bad.jsonl").write_text('{"prompt"\n')
    with pytest.raises(DataError, match=r"bad.jsonl:1: not valid JSON"):
        read_instructions(tmp_path / "bad.jsonl", encoder(), 32)


def test_every_epoch_holds_each_document_once_and_a_stream_resumes(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ", "completion": "z" * (i % 23 + 1)} for i in range(40)]
    data = read_instructions(write(tmp_path / "d.jsonl", rows), encoder(), 48)
    stream = InstructionStream(data.documents, 48, seed=3)
    whole = sorted(tuple(tokens.tolist()) for tokens, _ in data.documents)
    seen = []
    for _ in range(2):
        found = []
        for _ in range(stream.rows_per_epoch):
            tokens, lengths, weights = stream.next()
            assert sum(lengths) == len(tokens) == len(weights) <= 48
            found += [tuple(part.tolist()) for part in tokens.split(lengths)]
        assert sorted(found) == whole
        seen.append(found)
    assert seen[0] != seen[1]  # another order
    stream.next()
    again = InstructionStream(data.documents, 48, seed=3)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert again.next()[0].tolist() == stream.next()[0].tolist()
    filled = sum(len(t) for t, _ in data.documents) / (48 * stream.rows_per_epoch)
    assert filled > 0.85
    with pytest.raises(DataError, match="no document"):
        InstructionStream([], 48, 0)
