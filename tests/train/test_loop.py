from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serval.errors import CheckpointError, ConfigError, ServalError
from serval.optim import OPTIMIZERS, MixedOptimizer
from serval.train import checkpoint
from serval.train.loop import Trainer
from serval.train.reporting import Callback, Console, JsonLog, Metrics, TensorBoard
from serval.train.stream import next_token_targets
from tests.train.toy import ToyStream, toy_config, toy_trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return trainer.decoder.state_dict()


def assert_same(left: Trainer, right: Trainer) -> None:
    for name, tensor in weights(left).items():
        assert torch.equal(tensor, weights(right)[name]), name


class StopAt(Callback):
    """Raises in the middle of a run, after step `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, step: int, *rest: Any) -> None:
        if step == self.at:
            raise RuntimeError("killed")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_is_bit_exact(tmp_path: Path, optimizer: str, stop: int) -> None:
    whole = toy_trainer(None, optimizer)
    whole.fit()
    broken = toy_trainer(tmp_path, optimizer, callbacks=[StopAt(stop)])
    with pytest.raises(RuntimeError, match="killed"):
        broken.fit()
    resumed = toy_trainer(tmp_path, optimizer)
    resumed.fit()
    assert resumed.step == 8
    assert resumed.tokens_seen == whole.tokens_seen
    assert_same(whole, resumed)
    left, right = whole.optimizer.state_tensors(), resumed.optimizer.state_tensors()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_random_state_is_restored(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    want = torch.rand(3)
    torch.manual_seed(99)
    toy_trainer(tmp_path, steps=2).resume()
    assert torch.equal(torch.rand(3), want)


def test_accumulated_small_batches_equal_one_big_batch() -> None:
    grads: list[list[Tensor]] = []
    for size in (1, 2, 4):
        trainer = toy_trainer(micro_batch_rows=size)
        rows = [next_token_targets(trainer.stream.next()) for _ in range(4)]
        trainer.accumulate(rows)
        grads.append([p.grad for p in trainer.decoder.parameters() if p.grad is not None])
    for other in grads[1:]:
        for want, got in zip(grads[0], other, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_rows_of_unequal_weight_count_by_token() -> None:
    trainer = toy_trainer()
    light = (torch.arange(32), [32], torch.zeros(32).index_fill(0, torch.tensor([5]), 1.0))
    heavy = (torch.arange(32).flip(0), [32], None)
    rows = [next_token_targets(light), next_token_targets(heavy)]
    with torch.no_grad():
        sums = [float(trainer.loss(row)[1]) for row in rows]
    assert trainer.accumulate(rows) == pytest.approx(sum(sums) / 32, rel=1e-5)


def test_clipping_limits_the_norm_and_reports_it_unclipped() -> None:
    trainer = toy_trainer(clip_norm=0.01)
    trainer.accumulate([next_token_targets(trainer.stream.next()) for _ in range(4)])
    before = trainer._clip()
    assert before > 0.01
    assert trainer._clip() == pytest.approx(0.01, rel=1e-3)


def test_rows_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_rows is 4; expected a multiple of"):
        toy_trainer(micro_batch_rows=3)


def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_step_end(
            self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
        ) -> None:
            if step == 4:
                next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(ServalError, match=r"loss became NaN at step 5; lower optimizer.lr"):
        toy_trainer(tmp_path, callbacks=[Spoil()]).fit()
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path)] == [3]


def test_callbacks_see_steps_validation_and_keep_state(tmp_path: Path) -> None:
    class Count(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.losses: list[float] = []
            self.total = 0

        def on_step_end(self, step: int, *rest: Any) -> None:
            self.steps.append(step)
            self.total += 1

        def on_validation_end(self, step: int, model: nn.Module, metrics: Metrics) -> None:
            self.losses.append(metrics["validation_loss"])

        def state_dict(self) -> dict[str, Any]:
            return {"total": self.total}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.total = state["total"]

    rows = [ToyStream(32, seed=9).next() for _ in range(2)]
    first = Count()
    toy_trainer(tmp_path, steps=4, callbacks=[first], validation=rows, validate_every=2).fit()
    assert first.steps == [1, 2, 3, 4]
    assert len(first.losses) == 2
    again = Count()
    longer = toy_trainer(tmp_path, steps=6, callbacks=[again], validation=rows)
    longer.fit()
    assert again.total == 6
    assert longer.validate() == pytest.approx(again.losses[-1])


def test_interrupt_finishes_the_step_saves_and_resumes(tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_step_end(self, step: int, *rest: Any) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    stopped = toy_trainer(tmp_path, callbacks=[Interrupt()])
    stopped.fit()
    assert stopped.interrupted
    assert stopped.step == 4
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = toy_trainer(tmp_path)
    resumed.fit()
    whole = toy_trainer()
    whole.fit()
    assert_same(whole, resumed)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    toy_trainer(tmp_path, checkpoint_every=1, keep_checkpoints=3).fit()
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path)] == [6, 7, 8]


@pytest.mark.parametrize("damage", ["truncated", "no-meta", "garbage", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    toy_trainer(tmp_path).fit()
    newest = checkpoint.list_checkpoints(tmp_path)[-1]
    file = newest.path / "state.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "no-meta":
        (newest.path / "state.json").unlink()
    elif damage == "garbage":
        (newest.path / "state.json").write_text("{")
    else:
        file.unlink()
    (tmp_path / ".writing-step-00000099").mkdir()
    notes: list[str] = []
    trainer = toy_trainer(tmp_path)
    trainer.note = notes.append
    trainer.fit()
    assert "passing over damaged checkpoint step-00000008" in notes[0]
    assert "at step 6" in notes[1]
    assert trainer.step == 8
    assert checkpoint.latest_usable(tmp_path) is not None
    assert not list(tmp_path.glob(".writing-*"))


def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_trainer(tmp_path, steps=3).fit()

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*MiB are free.*resume"):
        toy_trainer(tmp_path, steps=6, checkpoint_every=1).fit()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_log_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(ServalError, match=r"cannot write .*log\.jsonl"):
        JsonLog(tmp_path / "log.jsonl").on_validation_end(1, torch.nn.Identity(), {"x": 1.0})


def test_a_checkpoint_moves_between_machines_with_and_without_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(checkpoint, "rng_tensors", lambda: states)
    toy_trainer(tmp_path, steps=2).fit()
    monkeypatch.undo()
    trainer = toy_trainer(tmp_path, steps=3)
    trainer.fit()
    assert trainer.step == 3
    monkeypatch.setattr(checkpoint, "rng_tensors", lambda: states)
    assert toy_trainer(tmp_path, steps=4).resume()


def test_another_recipe_is_refused_naming_the_key(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=2, fingerprint={"optimizer": {"lr": 0.1}, "model": {}}).fit()
    family = {"optimizer": {"lr": 0.1}, "model": {"family": "qwen3"}}  # free to change
    toy_trainer(tmp_path, steps=2, fingerprint=family).fit()
    with pytest.raises(ConfigError, match=r"optimizer\.lr = 0\.1, the recipe now says 0\.2"):
        toy_trainer(tmp_path, steps=2, fingerprint={"optimizer": {"lr": 0.2}}).fit()


def test_a_new_option_at_its_default_does_not_refuse_an_old_checkpoint(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=2, fingerprint={"optimizer": {"lr": 0.1}}).fit()
    later = {"optimizer": {"lr": 0.1, "mona_beta": 0.975}}
    defaults = frozenset({"optimizer.mona_beta"})
    toy_trainer(tmp_path, steps=3, fingerprint=later, defaults=defaults).fit()
    changed = {"optimizer": {"lr": 0.1, "mona_beta": 0.5}}
    with pytest.raises(ConfigError, match=r"mona_beta = 0\.975, the recipe now says 0\.5"):
        toy_trainer(tmp_path, steps=4, fingerprint=changed, defaults=defaults).fit()
    (tmp_path / "other").mkdir()
    toy_trainer(tmp_path / "other", steps=2, fingerprint={"optimizer": {"lr": 0.1}}).fit()
    with pytest.raises(ConfigError, match=r"mona_beta = None, the recipe now says 0\.975"):
        toy_trainer(tmp_path / "other", steps=3, fingerprint=later).fit()


def test_another_model_or_optimizer_is_refused_naming_the_tensor(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    with pytest.raises(CheckpointError, match=r"lacks 'model\.layers\.2\."):
        toy_trainer(tmp_path, config=toy_config(num_hidden_layers=3)).fit()
    with pytest.raises(CheckpointError, match=r"left over|lacks"):
        toy_trainer(tmp_path, "muon").fit()
    with pytest.raises(CheckpointError, match="does not fit"):
        toy_trainer(tmp_path, config=toy_config(intermediate_size=64)).fit()


def test_log_has_one_line_per_step_after_a_crash(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(RuntimeError):
        toy_trainer(tmp_path / "c", callbacks=[JsonLog(log), StopAt(5)]).fit()
    with log.open("a") as file:
        file.write('{"step": 6, "lo')
    toy_trainer(tmp_path / "c", callbacks=[JsonLog(log)]).fit()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1].keys() >= {"loss", "lr", "grad_norm", "tokens_per_second", "mfu"}


def test_console_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ToyStream(32, seed=9).next()]
    callbacks = [Console(4, every=2), TensorBoard(tmp_path / "tb")]
    toy_trainer(steps=4, callbacks=callbacks, validation=rows).fit()
    printed = capsys.readouterr().out
    assert "step 2/4" in printed
    assert "tok/s" in printed
    assert "left" in printed
    assert "validation loss" in printed
    assert list((tmp_path / "tb").iterdir())


def test_bfloat16_trains() -> None:
    trainer = toy_trainer(steps=30, dtype=torch.bfloat16)
    rows = [next_token_targets(ToyStream(32, seed=3).next())]
    with torch.no_grad():
        before = float(trainer.loss(rows[0])[1])
    trainer.fit()
    with torch.no_grad():
        after = float(trainer.loss(rows[0])[1])
    assert after < before
    assert all(p.dtype == torch.float32 for p in trainer.decoder.parameters())
