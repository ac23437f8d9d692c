from __future__ import annotations

from random import Random

import pytest

from serval.data.synthetic import TASKS, Filler
from serval.engine.llm import LLM
from serval.errors import ConfigError
from serval.evaluate.parity import compare
from serval.evaluate.pipeline import default_lengths
from serval.evaluate.retrieval import Cell, accuracy, ask, make_questions, matches
from tests.evaluate.toy import toy_decoder


@pytest.fixture(scope="module")
def filler() -> Filler:
    rng = Random(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import"]
    lines = "\n".join(" ".join(rng.choices(words, k=8)) for _ in range(200))
    return Filler([lines], str.split)


@pytest.mark.parametrize("task", TASKS)
def test_questions_fit_their_length_and_depth(task, filler):
    questions = make_questions([task], [128, 256], filler, samples=2, depths=4)
    assert len(questions) == 2 * 4 * 2
    assert questions == make_questions([task], [128, 256], filler, samples=2, depths=4)
    assert len({q.prompt for q in questions}) == len(questions)
    for question in questions:
        assert len(question.prompt.split()) <= question.length
        assert question.answer.strip().rstrip(".") in question.prompt
        assert 0 <= question.depth <= 1
    near = [q for q in questions if abs(q.depth - (q.band + 0.5) / 4) <= 0.2]
    assert len(near) >= 0.8 * len(questions)


def test_matching_is_exact_up_to_what_follows():
    assert matches(" 123456\nred fox", " 123456")
    assert matches("123456.", " 123456.")
    assert matches(" 123456", " 123456.")
    assert not matches(" 1234567", " 123456")
    assert not matches(" 12345", " 123456")
    assert not matches(" wolfram", " wolf")


class WordTokenizer:
    """Every distinct word is a token; ids are handed out on first sight."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        words = text.replace("\n", " \n ").split(" ")
        return {"input_ids": [self.words.setdefault(w, len(self.words)) for w in words if w]}


class Oracle:
    """Stands for an engine that answers some questions rightly."""

    def __init__(self, answers, right):
        self.answers, self.right, self.asked = answers, right, 0

    def generate(self, prompts, params):
        from types import SimpleNamespace as Bag

        outputs = []
        for parameters in params:
            assert parameters.temperature == 0
            text = self.answers[self.asked] if self.right(self.asked) else " wrong"
            outputs.append(Bag(outputs=[Bag(text=text + "\n")]))
            self.asked += 1
        return outputs


def test_cells_count_exact_matches(filler):
    questions = make_questions(["needle", "mqar"], [128], filler, samples=3, depths=2)
    ticks: list[int] = []
    oracle = Oracle([q.answer for q in questions], right=lambda i: i < 6)
    cells = ask(oracle, WordTokenizer(), questions, depths=2, batch=5, tick=ticks.append)
    assert sum(ticks) == len(questions) == 12
    assert [(c.task, c.correct, c.total) for c in cells] == [
        ("needle", 3, 3),
        ("needle", 3, 3),
        ("mqar", 0, 3),
        ("mqar", 0, 3),
    ]
    assert accuracy(cells) == 0.5
    assert [c.depth for c in cells] == [0.25, 0.75] * 2
    assert Cell("needle", 1, 0.5).accuracy != Cell("needle", 1, 0.5).accuracy  # NaN


@pytest.mark.parametrize("kv", ["full", "int8"])
def test_questions_go_through_the_engine(filler, kv):
    llm = LLM(toy_decoder(vocab_size=900, max_position_embeddings=512), kv=kv)
    questions = make_questions(["needle"], [64], filler, samples=1, depths=2)
    cells = ask(llm, WordTokenizer(), questions, depths=2)
    assert sum(cell.total for cell in cells) == 2


def test_bad_requests_are_named(filler):
    with pytest.raises(ConfigError, match="unknown task 'haystack'"):
        make_questions(["haystack"], [128], filler)
    with pytest.raises(ConfigError, match="10 tokens is too short"):
        make_questions(["needle"], [10], filler)


def test_default_lengths_end_at_the_context():
    assert default_lengths(2048) == [256, 512, 1024, 2048]
    assert default_lengths(3000) == [256, 512, 1024, 2048, 3000]
    assert default_lengths(100) == [100]


def test_parity_reports_the_first_difference():
    assert compare([[1, 2], [3]], [[1, 2], [3]]).identical
    parity = compare([[1, 2, 3], [4], [5]], [[1, 9, 3], [4, 6], [5]])
    assert not parity.identical
    assert [(d.index, d.at, d.ours, d.expected) for d in parity.divergences] == [
        (0, 1, 2, 9),
        (1, 1, None, 6),
    ]
    assert (parity.sequences, parity.tokens, parity.agreed) == (3, 6, 3)
    assert "sequence 0 first at generated token 1: 2 instead of 9" in str(parity)
    with pytest.raises(ValueError, match="2 sequences against 1"):
        compare([[1], [2]], [[1]])
