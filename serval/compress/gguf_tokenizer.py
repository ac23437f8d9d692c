"""A byte-level BPE tokenizer as GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serval.errors import ConfigError
from serval.models.checkpoint.files import read_json
from serval.models.config import ModelConfig

# llama.cpp knows ways of splitting text by name; these are the patterns behind some of them.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}


def write_tokenizer(gguf: Any, writer: Any, directory: Path, config: ModelConfig) -> None:
    """Vocabulary, merges, special tokens and chat template of a checkpoint directory. Raises
    ConfigError for a tokenizer that is not byte-level BPE or splits text in an unknown way."""
    tokenizer = read_json(directory / "tokenizer.json")
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConfigError(
            f"tokenizer model is {model.get('type')!r} with byte_fallback "
            f"{model.get('byte_fallback')!r}; byte-level BPE can be exported to GGUF"
        )
    added = {token["id"]: token for token in tokenizer.get("added_tokens", ())}
    names = {index: token for token, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    tokens = [names.get(i, f"<unused{i}>") for i in range(config.vocab_size)]
    kinds = [_kind(gguf, i, names, added) for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(tokenizer.get("pre_tokenizer") or {}))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_add_bos_token(_begins_with_token(tokenizer.get("post_processor") or {}))
    for name, value in (
        ("bos", config.bos_token_id),
        ("eos", next(iter(config.eos_token_ids()), None)),
        ("pad", config.pad_token_id),
    ):
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    template = _chat_template(directory)
    if template:
        writer.add_chat_template(template)


def _kind(gguf: Any, index: int, names: dict[int, str], added: dict[int, Any]) -> Any:
    if index in added:
        special = added[index].get("special", False)
        return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.NORMAL if index in names else gguf.TokenType.UNUSED


def _split_name(pre: dict[str, Any]) -> str:
    steps = pre.get("pretokenizers", [pre])
    patterns = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    if len(patterns) == 1 and patterns[0] in SPLITS:
        return SPLITS[patterns[0]]
    if not patterns and [s.get("type") for s in steps] == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    raise ConfigError(
        "tokenizer.json splits text by a pattern whose name in llama.cpp Serval does not know "
        f"({patterns or [s.get('type') for s in steps]}); known: {', '.join(SPLITS.values())}, "
        "gpt-2"
    )


def _begins_with_token(post: dict[str, Any]) -> bool:
    """Whether the tokenizer itself puts a special token before a text."""
    steps = post.get("processors", [post])
    single = [s["single"] for s in steps if s.get("type") == "TemplateProcessing"]
    return bool(single and single[0] and "SpecialToken" in single[0][0])


def _chat_template(directory: Path) -> str | None:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    path = directory / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None
