"""The sweep over batch and learning rate: which trials run, what is kept, what is chosen; and one that really trains."""
import gc
import io
import json
import math

import pytest
from rich.console import Console

from farskip_fx.cli import main
from farskip_fx.distill import command
from farskip_fx.distill.sweep import sweep
from farskip_fx.errors import ConfigError

from distill_cases import save_model_and_text

RUN = """
model: {folder}/model
data: {{files: ["{folder}/*.txt"], length: 16, held_out: 0.2}}
distill: {{inner: eager, teacher: copy, stop_metric: code}}
training: {{output_dir: {folder}/run, learning_rate: 1.0e-3, per_device_train_batch_size: 4, warmup_steps: 1000, use_cpu: true,
           report_to: [], save_strategy: steps, load_best_model_at_end: true, disable_tqdm: true}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


@pytest.fixture
def trained(monkeypatch):
    """Instead of training: KL has its minimum at batch 8 and learning rate 2e-3."""
    runs = []

    def stand_in(data, path, console):
        runs.append(data)
        training = data["training"]
        batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
        kl = abs(math.log(batch / 8)) + abs(math.log(training["learning_rate"] / 2e-3))
        kl = math.nan if batch == 2 else kl
        return object(), None, {"eval_kl": kl, "eval_agree": 1 / (1 + kl), "eval_bits_per_byte": 1 + kl, "eval_loss": kl}

    monkeypatch.setattr(command, "trained", stand_in)
    monkeypatch.setattr(gc, "collect", lambda: 0)       # of all that the tests before have made
    return runs


def tried(found):
    return [(t["batch"], t["learning_rate"]) for t in found["trials"]]


def test_batches_then_rates(file, trained):
    """As in the paper; a diverged trial is never the best; the best pair of both sweeps is run once."""
    said = io.StringIO()
    found = sweep(file, batches=[2, 8, 6, 32], learning_rates=[1e-3, 2e-3, 4e-3], steps=20, console=Console(file=said, width=140))
    assert tried(found) == [(2, 1e-3), (8, 1e-3), (6, 1e-3), (32, 1e-3), (8, 2e-3), (8, 4e-3)]
    assert (found["best"]["batch"], found["best"]["learning_rate"], found["best"]["tokens"]) == (8, 2e-3, 128)
    text = said.getvalue()
    assert "20 steps each; best by kl" in text and "learning_rate: 0.002, per_device_train_batch_size: 4, gradient_acc" in text
    saved = json.loads((file.parent / "run" / "sweep" / "sweep.json").read_text())
    assert saved["best"]["batch"] == 8 and len(saved["trials"]) == 6
    # A trial is the file's run, short, and to its end.
    training = trained[2]["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (3, 2)
    assert (training["max_steps"], training["warmup_steps"], training["save_strategy"]) == (20, 10, "no")
    assert training["load_best_model_at_end"] is False and trained[2]["distill"] == {"inner": "eager", "teacher": "copy", "stop_metric": None}
    assert training["output_dir"].endswith("run/sweep/batch-6_lr-0.001")


def test_again_after_an_interruption(file, trained, monkeypatch):
    go_on = command.trained

    def interrupted(data, path, console):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return go_on(data, path, console)

    monkeypatch.setattr(command, "trained", interrupted)
    options = dict(batches=[4, 8], learning_rates=[1e-3, 2e-3], grid=True, steps=5)
    with pytest.raises(KeyboardInterrupt):
        sweep(file, **options)
    monkeypatch.setattr(command, "trained", go_on)
    found = sweep(file, **options)
    assert tried(found) == [(4, 1e-3), (4, 2e-3), (8, 1e-3), (8, 2e-3)] and len(trained) == 4
    assert sweep(file, **options) == found and len(trained) == 4
    file.write_text(file.read_text().replace("length: 16", "length: 8"))
    with pytest.raises(ConfigError, match=r"batch-4_lr-0.001 holds a trial of another run \(data.length changed\)"):
        sweep(file, **options)
    assert tried(sweep(file, **options, output=file.parent / "other", metric="agree"))[0] == (4, 1e-3)


@pytest.mark.parametrize("options, text", [
    (dict(), "nothing to sweep"), (dict(batches=[4], metric="loss"), "choose one of kl, cross_entropy, bits_per_byte"),
    (dict(batches=[4], steps=0), "must be above 0"), (dict(batches=[4, 0]), "a batch of 0 sequences"),
])
def test_refused(file, trained, options, text):
    with pytest.raises(ConfigError, match=text):
        sweep(file, **options)
    assert not trained


def test_ranks_share_a_batch(file, trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="a batch of 6 sequences cannot be shared by 4 ranks"):
        sweep(file, batches=[8, 6])
    sweep(file, batches=[24], steps=5)
    assert trained[0]["training"]["per_device_train_batch_size"] == 3
    assert trained[0]["training"]["gradient_accumulation_steps"] == 2
    assert not (file.parent / "run").exists()       # that is rank 0's


@pytest.mark.slow
def test_command(file, tmp_path, capsys):
    save_model_and_text(tmp_path)
    assert main(["sweep", str(file), "--batch", "4", "--learning-rate", "1e-3", "1e-2", "--steps", "3"]) == 0
    assert "best by kl" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "sweep" / "sweep.json").read_text())
    assert [t["learning_rate"] for t in found["trials"]] == [1e-3, 1e-2]
    assert all(0 < t["metrics"]["kl"] < 10 for t in found["trials"]) and not list((tmp_path / "run").glob("sweep/*/*.safetensors"))
    assert main(["sweep", str(file)]) == 2 and "nothing to sweep" in capsys.readouterr().err
