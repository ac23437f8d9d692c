"""Adapters as models of their own behind the API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from serval import LLM, SamplingParams
from serval.adapt.lora import LoraOptions, add_adapters, merge
from serval.adapt.peft_format import save_adapter
from serval.errors import CheckpointError, ConfigError
from serval.models import checkpoint
from serval.server.serve import ServeOptions, build_app
from tests.adapt.toy import fill
from tests.server.live import LiveServer


@pytest.fixture(scope="module")
def adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = checkpoint.load(model_dir)
    add_adapters(decoder, LoraOptions(rank=4, alpha=32.0))
    fill(decoder)
    folder = tmp_path_factory.mktemp("lora")
    path = save_adapter(decoder, folder / "cats")
    merge(decoder)
    checkpoint.save(decoder, folder / "merged", tokenizer_dir=model_dir)
    return path


@pytest.fixture(scope="module")
def live(model_dir: Path, adapter: Path) -> Iterator[LiveServer]:
    options = ServeOptions(
        str(model_dir), served_model_name=["tiny"], lora=[f"cats={adapter}"], cache_bytes=2**20
    )
    app = build_app(options)
    with LiveServer(app, app.state.serval.backend) as server:
        yield server
        server.check_integrity()


def test_the_model_name_chooses_the_adapter(live: LiveServer, adapter: Path) -> None:
    cards = httpx.get(live.url + "/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), ("cats", "tiny")]
    body = {"prompt": "The serval is a wild cat", "max_tokens": 8, "temperature": 0}
    body["ignore_eos"] = True
    texts = {}
    for name in ("tiny", "cats", "tiny"):
        answer = httpx.post(live.url + "/v1/completions", json={**body, "model": name}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        text = answer.json()["choices"][0]["text"]
        assert texts.setdefault(name, text) == text
    assert texts["tiny"] != texts["cats"]
    merged = LLM(adapter.parent / "merged")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert merged.generate(body["prompt"], params)[0].outputs[0].text == texts["cats"]


def test_chat_and_unknown_names(live: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "cats?"}], "max_tokens": 3, "stream": True}
    body["model"] = "cats"
    answer = httpx.post(live.url + "/v1/chat/completions", json=body, timeout=60)
    assert '"model":"cats"' in answer.text.replace(": ", ":")
    wrong = httpx.post(live.url + "/v1/completions", json={"model": "dogs", "prompt": "a"})
    assert wrong.status_code == 404
    assert "'tiny', 'cats'" in wrong.json()["error"]["message"]
    assert httpx.get(live.url + "/v1/models/cats").json()["id"] == "cats"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (["cats"], "--lora 'cats': expected NAME=DIRECTORY"),
        (["=x"], "expected NAME=DIRECTORY"),
        (["a=x", "a=y"], "--lora a is given twice"),
        (["tiny=x"], "the model itself has that name"),
    ],
)
def test_bad_options(lora: list[str], message: str, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeOptions(str(model_dir), served_model_name=["tiny"], lora=lora)


def test_an_adapter_that_is_not_there(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter directory"):
        build_app(ServeOptions(str(model_dir), lora=["x=/nowhere"], cache_bytes=2**20))
    assert torch.is_grad_enabled()
