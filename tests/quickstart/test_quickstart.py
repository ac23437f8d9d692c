from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from io import StringIO

import pytest
from rich.console import Console

from serval.errors import CheckpointError, ConfigError, ServalError
from serval.quickstart import MEASURES, QuickstartOptions, Variant, run
from serval.quickstart.flow import find_model
from serval.quickstart.serving import complete, serving, stop
from tests.evaluate.conftest import model, texts  # noqa: F401 fixtures

SMALL = {
    "lengths": [96],
    "samples": 1,
    "tasks": ("needle",),
    "text_tokens": 200,
    "speed_prompt": 8,
    "speed_output": 4,
}


@pytest.fixture(scope="module")
def trained(model, texts):  # noqa: F811
    recipe = f"data: {{source: folder, path: {texts}, validation_fraction: 0.999}}\n"
    (model / "recipe.yaml").write_text(recipe)
    return model


def test_the_whole_path(trained, tmp_path):
    out = tmp_path / "out"
    console = Console(record=True, width=80, file=StringIO())
    outcomes = run(QuickstartOptions(trained, out, **SMALL), console)
    assert [o.variant.kv for o in outcomes] == ["full", "full", "full", "int8"]
    base, last = outcomes[0], outcomes[-1]
    assert last.weight_bytes < 0.5 * base.weight_bytes
    assert last.weight_bytes < outcomes[1].weight_bytes
    assert last.cache_bytes_per_token < 0.5 * base.cache_bytes_per_token
    assert base.quality.text.kl is None
    assert 0 < last.quality.text.kl < 0.5
    shown = console.export_text()
    for words in ("perplexity", "decode, batch 8", "Served", "server stopped", "serval serve"):
        assert words in shown
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "http://" not in page.replace("http://127.0.0.1", "")
    for measure in MEASURES:
        assert measure.label in page or "key-value" in measure.label
    values = json.loads((out / "report.json").read_text())
    assert len(values["outcomes"]) == 4
    again = run(QuickstartOptions(trained, out, serve=False, **SMALL), console)
    assert again[-1].quality.text.perplexity == pytest.approx(last.quality.text.perplexity)


def test_a_new_variant_is_one_line(trained, tmp_path):
    variants = (Variant("base"), Variant("keep o", "int8", {"ignore": ["*.o_proj"]}))
    options = QuickstartOptions(trained, tmp_path, serve=False, variants=variants, **SMALL)
    outcomes = run(options, Console(file=StringIO()))
    assert [o.variant.name for o in outcomes] == ["base", "keep o"]


def test_the_shipped_model_is_looked_for(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("serval.quickstart.flow.ASSET", "assets/none")
    with pytest.raises(ConfigError, match="assets/none was not found"):
        find_model(None)
    with pytest.raises(CheckpointError, match="no directory"):
        find_model("nowhere")
    assert find_model(trained) == trained


def test_a_server_that_does_not_start_says_why(tmp_path):
    with (
        pytest.raises(ServalError, match=r"did not start.*\n.*no directory"),
        serving(tmp_path / "x"),
    ):
        pass


def test_stopping_insists(monkeypatch):
    monkeypatch.setattr("serval.quickstart.serving._STOP_SECONDS", 0.3)
    script = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    assert stop(process) == -9
    assert stop(process) == -9


class Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "busy"}}')

    def log_message(self, *args):
        pass


def test_refusals_reach_the_user():
    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(ServalError, match=r"503.*busy"):
        next(complete(url, "x"))
    server.shutdown()
    server.server_close()
    with pytest.raises(ServalError, match="cannot be reached"):
        next(complete(url, "x", timeout=2))
