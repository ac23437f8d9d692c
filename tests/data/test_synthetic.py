"""Generated tasks: answers are in the context, lengths are kept, seeds repeat."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from serval.data.chat import ChatDocuments
from serval.data.synthetic import (
    TASKS,
    TRAINING_TASKS,
    Filler,
    Sample,
    make_sample,
    needle,
    training_document,
    variables,
)
from serval.errors import ConfigError

TEXT = "import os\n\ndef walk(top):\n    for name in os.listdir(top):\n        yield name\n" * 40


def make_filler(tokenizer: Tokenizer) -> Filler:
    return Filler([TEXT], lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


@settings(max_examples=40, deadline=None)
@given(task=st.sampled_from(sorted(TASKS)), length=st.integers(96, 900), seed=st.integers(0, 99))
def test_sample_fits_its_length_and_hides_every_answer(tokenizer, task, length, seed) -> None:
    filler = make_filler(tokenizer)
    sample = make_sample(task, Random(seed), filler, length)
    context = sample.prompt(sample.queries[0])
    assert len(filler.encode(context)) <= length + 24
    for query in sample.queries:
        assert 0.0 <= query.depth <= 1.0
        assert query.answer.strip(" .") in context
        assert sample.prompt(query).endswith(query.question)
    again = make_sample(task, Random(seed), filler, length)
    assert again == sample


@pytest.mark.parametrize("task", sorted(TASKS))
def test_pieces_tokenise_as_the_whole_text_does(tokenizer, task) -> None:
    filler = make_filler(tokenizer)
    sample = make_sample(task, Random(3), filler, 400)
    query = sample.queries[0]
    whole = filler.encode(sample.prompt(query) + query.answer)
    answer = filler.encode(query.answer)
    assert whole[-len(answer) :] == answer


@settings(max_examples=30, deadline=None)
@given(task=st.sampled_from(sorted(TASKS)), length=st.integers(64, 900), seed=st.integers(0, 99))
def test_training_document_weighs_answers_only_as_asked(tokenizer, task, length, seed) -> None:
    tokens, weights = training_document(task, Random(seed), make_filler(tokenizer), length, 3.0)
    assert len(tokens) == len(weights) <= length
    assert set(weights) <= {0.0, 1.0, 3.0}


def test_a_task_says_how_much_of_a_document_is_context(tokenizer, monkeypatch) -> None:
    asked: list[int] = []

    def make(rng: Random, filler: Filler, length: int) -> Sample:
        asked.append(length)
        return needle(rng, filler, length)

    halves = replace(TASKS["needle"], make=make, context_share=(0.5, 0.5))
    monkeypatch.setitem(TRAINING_TASKS, "halves", halves)
    training_document("halves", Random(0), make_filler(tokenizer), 400)
    assert asked == [200]


def test_variable_chains_follow_the_assignments(tokenizer) -> None:
    for hops in range(4):
        sample = variables(Random(hops), make_filler(tokenizer), 600, hops=hops)
        facts = [text.split() for text, _ in sample.context if text.startswith("let ")]
        value_of: dict[str, str] = {}
        for _, name, _, source in facts:
            value_of[name] = value_of.get(source, source)
        for query in sample.queries:
            name = query.question.split()[2]
            assert query.answer.strip() == value_of[name]


def test_needle_depths_cover_the_context(tokenizer) -> None:
    filler = make_filler(tokenizer)
    depths = [make_sample("needle", Random(s), filler, 500).queries[0].depth for s in range(60)]
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_unknown_task_lists_the_known_ones(tokenizer) -> None:
    with pytest.raises(ConfigError, match="unknown task 'chess'; choose one of: needle"):
        make_sample("chess", Random(0), make_filler(tokenizer), 100)


def test_chat_documents_predict_assistant_turns_only(tokenizer) -> None:
    source = (
        'def area(r):\n    """Return the area of a circle of radius r."""\n    return 3 * r * r\n'
    )
    chat = ChatDocuments([source], make_filler(tokenizer))
    seen = set()
    for seed in range(40):
        pieces = chat.draw(Random(seed), 400)
        text = "".join(piece for piece, _ in pieces)
        assert text.startswith("<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n")
        predicted = [piece for piece, predictable in pieces if predictable]
        assert predicted
        assert all(piece.endswith("<|im_end|>") for piece in predicted)
        seen.add(pieces[1][0].split()[0])
    assert len(seen) >= 4
