"""Chat-formatted training documents, made from docstrings and generated notes.

They teach a small model the shape of a conversation: answer what a function does, find a fact in
pasted notes, continue a piece of code, say who it is.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from serval.data.synthetic import Filler, needles
from serval.data.tokenizer import IM_END, IM_START

_GREETINGS = (
    "Hello",
    "Hi",
    "Hey",
    "Hello there",
    "Good morning",
    "Who are you?",
    "What can you do?",
)
_INTRODUCTION = (
    "Hello! I am Serval, a tiny language model trained on the Python standard library. "
    "Ask me what a function does, or give me notes and ask about them."
)
_ASK_DOC = (
    "What does `{name}` do?",
    "What is `{name}` for?",
    "Explain `{name}`.",
    "Describe the {kind} `{name}` of Python.",
)


@dataclass(frozen=True)
class Documented:
    """A documented function or class: qualified name, kind, first paragraph, source."""

    name: str
    kind: str
    summary: str
    source: str


def documented(texts: Iterable[str]) -> list[Documented]:
    """Functions and classes with docstrings in Python sources; unparsable files are passed over."""
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            doc = ast.get_docstring(node)
            if not doc:
                continue
            summary = " ".join(doc.split("\n\n")[0].split())
            if 20 <= len(summary) <= 300:
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                source = ast.get_source_segment(text, node) or ""
                found.append(Documented(node.name, kind, summary, source))
    return found


def conversation(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """(text, predictable) pieces of a conversation; only assistant turns are predicted."""
    pieces = []
    for role, content in turns:
        pieces.append((f"{IM_START}{role}\n", False))
        pieces.append((f"{content}{IM_END}", role == "assistant"))
        pieces.append(("\n", False))
    return pieces


class ChatDocuments:
    """Draws chat documents: docstring questions, notes with facts, code completion, greetings."""

    def __init__(self, texts: Iterable[str], filler: Filler) -> None:
        self.items = documented(texts)
        self.filler = filler
        self.kinds: list[tuple[float, Callable[[Random, int], list[tuple[str, str]]]]] = [
            (0.35 if self.items else 0.0, self._ask),
            (0.35, self._notes),
            (0.2 if self.items else 0.0, self._complete),
            (0.1, self._greet),
        ]

    def draw(self, rng: Random, length: int) -> list[tuple[str, bool]]:
        """Pieces of one document of about `length` tokens at most."""
        weights, makers = zip(*self.kinds, strict=True)
        return conversation(rng.choices(makers, weights)[0](rng, length))

    def _ask(self, rng: Random, length: int) -> list[tuple[str, str]]:
        item = rng.choice(self.items)
        question = rng.choice(_ASK_DOC).format(name=item.name, kind=item.kind)
        return [("user", question), ("assistant", item.summary)]

    def _notes(self, rng: Random, length: int) -> list[tuple[str, str]]:
        context = min(length - 80, rng.choice((0, 64, 128, 256, 512, 1024)))
        sample = needles(rng, self.filler, max(context, 64), rng.randrange(1, 5))
        notes = "".join(text for text, _ in sample.context)
        turns = []
        for i, query in enumerate(sample.queries[:3]):
            key = query.question.removeprefix("The code of ").removesuffix(" is")
            ask = f"What is the code of {key}?"
            turns.append(("user", f"Here are my notes:\n{notes}{ask}" if i == 0 else ask))
            turns.append(("assistant", query.question + query.answer))
        return turns

    def _complete(self, rng: Random, length: int) -> list[tuple[str, str]]:
        item = rng.choice(self.items)
        lines = item.source.splitlines()[:40]
        cut = rng.randrange(1, max(2, len(lines)))
        head, tail = "\n".join(lines[:cut]), "\n".join(lines[cut:])
        return [
            ("user", f"Complete this code:\n```python\n{head}\n```"),
            ("assistant", f"```python\n{tail}\n```"),
        ]

    def _greet(self, rng: Random, length: int) -> list[tuple[str, str]]:
        turns = [
            ("user", rng.choice(_GREETINGS) + rng.choice(("", "!", "."))),
            ("assistant", _INTRODUCTION),
        ]
        if self.items and rng.random() < 0.5:
            turns += self._ask(rng, length)
        return turns
