"""Distillation runs: teachers, the trainer's arithmetic, resuming, evaluation, refusals."""
import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import farskip_fx as fs
from farskip_fx.distill import (CachedTeacher, DistillConfig, assert_rewired, check_head, distill, distillation_loss,
                                evaluate, head_of, hidden_states, last_checkpoint, make_teacher, table, token_bytes)
from farskip_fx.distill.cache import build
from farskip_fx.distill.trainer import RUN, StopOnTask
from farskip_fx.errors import ConfigError, RefusedError, WrongConnectivityError

from distill_cases import LENGTH, VOCABULARY, Texts, arguments, model_of, run, save_model_and_text
from ranks import run_ranks

IDS = torch.stack([Texts(rows=4, seed=3)[i]["input_ids"] for i in range(4)])
TARGETS = F.pad(IDS[:, 1:], (0, 1), value=-100)


@pytest.fixture(scope="module")
def student():
    return fs.apply(model_of().eval(), connectivity="farskip", inner="eager")


def gradients(student, target):
    student.zero_grad()
    hidden, _ = hidden_states(student, input_ids=IDS, use_cache=False)
    loss, _ = distillation_loss(hidden, head_of(student), target, TARGETS)
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in student.parameters() if p.requires_grad])


def off(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def by_copy(student):
    return gradients(student, make_teacher("copy", model_of(), inner="eager")(input_ids=IDS, use_cache=False))


# --- teachers -------------------------------------------------------------------------------------------------------------

def test_copy_is_the_kl_to_the_original(student, by_copy):
    """Against full logits of both models and plain autograd."""
    student.zero_grad()
    p = F.log_softmax(student(input_ids=IDS, use_cache=False).logits[:, :-1].double(), -1)
    q = F.log_softmax(model_of()(input_ids=IDS).logits[:, :-1].double(), -1).detach()
    (q.exp() * (q - p)).sum(-1).mean().backward()
    want = torch.cat([p.grad.reshape(-1) for p in student.parameters()])
    assert off(by_copy, want) < 1e-5 and want.norm() > 0.1


def test_int8_gradient(student, by_copy):
    """Weights to 8 bits, experts too: a quarter of the bytes; the gradient within 10 %, of 32 hidden values."""
    original = model_of()
    teacher = make_teacher("int8", original, inner="eager")
    small = {n for n, b in teacher.model.named_buffers() if b.dtype is torch.int8}
    assert sum("gate_up_proj" in n for n in small) == sum("down_proj" in n for n in small) == 2
    kept = sum(t.numel() * t.element_size() for n, t in [*teacher.model.named_parameters(), *teacher.model.named_buffers()]
               if "experts" in n)
    assert kept < 0.4 * sum(p.numel() * p.element_size() for n, p in original.named_parameters() if "experts" in n)
    assert off(gradients(student, teacher(input_ids=IDS, use_cache=False)), by_copy) < 0.1


@pytest.mark.parametrize("k, tolerance", [(VOCABULARY, 1e-5), (16, 0.15)])
def test_cached_gradient(student, by_copy, tmp_path, k, tolerance):
    dataset = [{"input_ids": row} for row in IDS]
    live = make_teacher("copy", model_of(), inner="eager")
    build(tmp_path, live, dataset, top_k=k, batch=2, rows_a_file=3)
    cached = CachedTeacher.open(tmp_path, model_of(), 4, top_k=k)
    assert off(gradients(student, cached(rows=range(4), input_ids=IDS)), by_copy) < tolerance
    with pytest.raises(ConfigError, match="other tokens than rows"):
        cached(rows=[1, 0, 2, 3], input_ids=IDS)
    for options, text in (({"model": model_of(seed=1)}, "has model="), ({"rows": 5}, "has rows=4"),
                          ({"top_k": 3}, "has top_k"), ({"temperature": 2.0}, "has temperature")):
        with pytest.raises(ConfigError, match=text):
            CachedTeacher.open(tmp_path, **{"model": model_of(), "rows": 4, "top_k": k, **options})
    (tmp_path / "teacher.json").unlink()
    with pytest.raises(ConfigError, match="no complete cache"):
        CachedTeacher.open(tmp_path, model_of(), 4, top_k=k)


def lora(model, **options):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], lora_dropout=0.1, **options))
    with torch.no_grad():       # as after some training
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted


def test_shared_is_the_copy():
    """One set of weights, two compiled forwards; the gradient is the copy's to the last bit."""
    student = lora(model_of())
    shared = make_teacher("shared", student, inner="aot_eager")
    copied = make_teacher("copy", model_of(), inner="aot_eager")       # compiled, too, with connectivity "none"
    fs.apply(student, connectivity="farskip", inner="aot_eager")
    student.train()
    for _ in range(2):      # the student's forward in between changes nothing
        target = shared(input_ids=IDS, use_cache=False)
        assert student.training and torch.equal(target.hidden, copied(input_ids=IDS, use_cache=False).hidden)
        torch.manual_seed(0)
        ours = gradients(student, target)
        torch.manual_seed(0)
        assert torch.equal(ours, gradients(student, copied(input_ids=IDS, use_cache=False)))
    assert assert_rewired(student) == 2
    student.base_model.model.model.embed_tokens.weight.requires_grad_(True)
    for wrong, text in ((student, "are no adapters"), (model_of(), "needs a LoRA student"),
                        (lora(model_of(), init_lora_weights="pissa"), "changes the base weights")):
        with pytest.raises(ConfigError, match=text):
            make_teacher("shared", wrong)


def test_a_converted_model_is_no_teacher(student):
    with pytest.raises(ConfigError, match="converted already"):
        make_teacher("copy", student)
    with pytest.raises(ConfigError, match="converted already"):
        make_teacher("copy", model_of(), copy_of=student)


# --- the trainer ----------------------------------------------------------------------------------------------------------

def first(trainer):
    return [trainer.state.log_history[0][name] for name in ("loss", "kl", "grad_norm", "tokens")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process that sees the whole batch: two steps of eight rows, padded."""
    return distill(model_of(), Texts(padded=True), inner="eager",
                   args=arguments(tmp_path_factory.mktemp("whole"), max_steps=2, per_device_train_batch_size=8))


def test_accumulation_is_one_batch(whole, tmp_path):
    """Micro-batches have different numbers of targets, and each target counts the same."""
    parts = distill(model_of(), Texts(padded=True), inner="eager", args=arguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4))
    loss, kl, _, tokens = first(whole)
    assert first(parts) == pytest.approx(first(whole), rel=1e-4)
    assert loss == pytest.approx(kl) and tokens < 8 * (LENGTH - 1)


def test_bf16_and_the_router_loss(whole, tmp_path):
    """Autocast moves the KL by little; the router's loss is off by default and comes on top of it."""
    half = distill(model_of(output_router_logits=True, router_aux_loss_coef=0.1), Texts(padded=True), inner="eager",
                   router_aux_loss=1.0, args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=8, bf16=True))
    loss, kl, _, _ = first(half)
    assert kl == pytest.approx(first(whole)[1], rel=0.05) and kl != first(whole)[1]
    assert loss > kl + 0.1          # two experts of four: a balanced router has a loss of about two


def on_two_ranks(rank, *, folder):
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="29513", LOCAL_RANK=str(rank),
                      RANK=str(rank), WORLD_SIZE="2")     # as torchrun does
    from torch.distributed.device_mesh import init_device_mesh
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    replicas = distill(model_of(), Texts(padded=True), inner="eager", args=arguments(folder, max_steps=1, **options))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    model = fs.expert_parallel(model_of(), mesh["ep"])
    trainer = distill(model, Texts(padded=True), inner="eager", data_parallel=mesh["dp"],
                      args=arguments(folder, max_steps=2, **options))
    state = fs.full_state_dict(trainer.model)
    dense = torch.cat([p.detach().reshape(-1) for n, p in trainer.model.named_parameters() if "experts" not in n])
    return first(replicas), first(trainer), dense, {n: t for n, t in state.items() if "experts" in n}


@pytest.mark.slow
def test_ranks_are_one_batch(whole, tmp_path):
    """Two ranks by DDP, and with experts sharded over them: loss, gradient norm and weights of one process."""
    ranks = run_ranks(on_two_ranks, 2, folder=str(tmp_path))
    for replicas, sharded, _, _ in ranks:
        assert replicas == pytest.approx(first(whole), rel=1e-4)
        assert sharded == pytest.approx(first(whole), rel=1e-4)
    assert torch.equal(ranks[0][2], ranks[1][2])
    for name, tensor in ranks[0][3].items():
        torch.testing.assert_close(tensor, whole.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def curve(trainer):
    return [(entry["step"], entry["loss"], entry["kl"], entry["grad_norm"]) for entry in trainer.state.log_history
            if "loss" in entry]


def test_killed_and_resumed_is_the_same_curve(tmp_path):
    script = Path(__file__).parent / "distill_cases.py"
    dead = subprocess.run([sys.executable, str(script), str(tmp_path / "killed"), "44"], capture_output=True, text=True,
                          timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-2000:]
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint is not None and json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"] in (2, 4)
    resumed, whole = run(tmp_path / "killed", resume=True), run(tmp_path / "whole")
    assert len(curve(whole)) == 7 and curve(resumed) == curve(whole)
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    # A checkpoint that was not finished is not taken.
    (tmp_path / "killed" / "checkpoint-9").mkdir()
    (tmp_path / "killed" / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9')
    assert last_checkpoint(tmp_path / "killed").endswith("checkpoint-7")
    assert last_checkpoint(tmp_path / "nothing") is None
    # What was saved says what it is; the run is in one file.
    saved = json.loads(Path(last_checkpoint(tmp_path / "whole"), "config.json").read_text())
    assert saved["farskip"]["connectivity"] == "farskip"
    assert DistillConfig.load(tmp_path / "whole" / RUN).inner == "eager"


@pytest.mark.slow
def test_adamw_8bit(tmp_path):
    """torchao's, by Trainer's name for it: near AdamW, with its state in a quarter of the bytes; resumed to the last bit."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def trained(folder, optimizer="adamw_torch_8bit", **options):
        return distill(model_of(), Texts(), inner="eager", args=arguments(
            tmp_path / folder, optim=optimizer, save_strategy="steps", save_steps=2, max_steps=5, warmup_steps=0), **options)

    usual, whole = trained("usual", "adamw_torch_fused"), trained("whole")
    losses, small = ([entry[1] for entry in curve(trainer)] for trainer in (usual, whole))
    assert small != losses and small == pytest.approx(losses, rel=1e-3)
    state = whole.optimizer.state[whole.model.model.layers[0].mlp.experts.down_proj]
    assert not isinstance(state["exp_avg"], OptimState8bit)         # 2048 values: left in full
    state = whole.optimizer.state[whole.model.model.layers[0].mlp.experts.gate_up_proj]
    assert isinstance(state["exp_avg"], OptimState8bit) and isinstance(state["exp_avg_sq"], OptimState8bit)
    resumed = trained("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert curve(resumed) == curve(whole)
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.slow
def test_training_agrees_more_and_stops_on_a_task(tmp_path):
    """The cached teacher through Trainer, evaluation in between, early stopping on a task that gets no better."""
    values = iter([1.0, 1.01, 1.015, 1.019, 5.0, 5.0])       # within 2 % of the first, three times
    trainer = distill(
        model_of(), Texts(rows=16),
        DistillConfig(teacher="cached", cache=str(tmp_path / "cache"), top_k=VOCABULARY, inner="eager", stop_metric="task",
                      stop_patience=3, layers=[1]),
        eval_dataset=Texts(rows=16), tasks={"task": lambda model: next(values)}, bytes_a_token=1.0,
        args=arguments(tmp_path, max_steps=40, eval_strategy="steps", eval_steps=4, save_steps=4, save_strategy="steps",
                       metric_for_best_model="task", greater_is_better=True, load_best_model_at_end=True))
    logs = trainer.state.log_history
    evaluations = [entry for entry in logs if "eval_kl" in entry]
    assert trainer.state.global_step == 16 and [entry["eval_task"] for entry in evaluations] == [1.0, 1.01, 1.015, 1.019]
    assert evaluations[-1]["eval_kl"] < 0.6 * evaluations[0]["eval_kl"]        # of the rows that it is trained on
    assert evaluations[0]["eval_bits_per_byte"] == pytest.approx(evaluations[0]["eval_cross_entropy"] / math.log(2))
    assert assert_rewired(trainer.model) == 1
    stop = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopOnTask))
    assert stop.state()["attributes"] == {"early_stopping_patience_counter": 3, "best": 1.0}


@pytest.mark.parametrize("options, arguments_, text", [
    (dict(connectivity="none"), {}, "converts nothing"),
    (dict(teacher="me"), {}, "choose one of copy, int8, shared, cached"),
    (dict(teacher="cached"), {}, "needs cache=FOLDER"),
    (dict(temprature=2), {}, "unknown option 'temprature'"),
    (dict(temperature=0), {}, "temperature must be a number above 0"),
    (dict(kl=0), {}, "there is no loss"),
    (dict(stop_metric="x"), {}, "needs TrainingArguments"),
    (dict(teacher="shared", prepare=print), {}, "needs a LoRA student"),
    (dict(optimizer="sgd"), {}, "choose one of '', 'muon'"),
    (dict(optimizer="muon"), dict(optim="sgd"), "are two optimizers"),
    (dict(hidden=-1), {}, "hidden must be a number of at least 0"),
    (dict(hidden=1, teacher="cached", cache="x"), {}, "keeps log-probabilities and no states"),
    ({}, dict(torch_compile=True), "torch_compile"),
    ({}, dict(label_smoothing_factor=0.1), "label_smoothing_factor"),
])
def test_refused(tmp_path, options, arguments_, text):
    with pytest.raises(ConfigError, match=text):
        distill(model_of(), Texts(), args=arguments(tmp_path, **arguments_), **{"inner": "eager", **options})


def test_config_round_trip(tmp_path):
    config = DistillConfig(connectivity={"0": "none", "1-": "attn_only"}, teacher="int8", temperature=2.0)
    other = DistillConfig(layers=range(2, 5), cross_entropy=0.1)
    for name in ("a.yaml", "a.json"):
        for one in (config, other):
            one.save(tmp_path / name)
            assert DistillConfig.load(tmp_path / name) == one
    with pytest.raises(ConfigError, match="version 2"):
        DistillConfig(version=2)


# --- evaluation -----------------------------------------------------------------------------------------------------------

def test_evaluation(student):
    original, batches = model_of(), [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:], "attention_mask": (IDS[1:] >= 0).long()}]
    teacher = make_teacher("copy", original, inner="eager")
    before = evaluate(original, batches, teacher=teacher, bytes_a_token=2.0)
    after = evaluate(student, [{"input_ids": IDS}], teacher=teacher, head=head_of(student), bytes_a_token=2.0)
    with torch.no_grad():
        logits = student(input_ids=IDS, use_cache=False).logits
    want = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    assert after.loss == pytest.approx(want.item(), rel=1e-5)
    assert after.bits_per_byte == pytest.approx(after.loss / math.log(2) / 2)
    assert (before.rewired, after.rewired, before.agreement) == (0, 2, 1.0) and before.kl < 1e-6 < after.kl
    drawn = table({"original": before, "converted": after})
    assert drawn.row_count == 2 and list(drawn.columns[-1].cells) == ["0", "2"]
    alone = evaluate(original, batches, bytes_a_token=torch.arange(VOCABULARY).float())
    assert math.isnan(alone.kl) and alone.bits_per_byte == pytest.approx(
        alone.loss * 60 / math.log(2) / TARGETS[TARGETS >= 0].sum().item())


def test_nobody_evaluates_the_original_by_mistake():
    model = fs.apply(model_of(), connectivity="mlp_only", inner="eager")
    with pytest.raises(WrongConnectivityError, match="no graph of this model was rewired"):
        assert_rewired(model)
    assert evaluate(model, [{"input_ids": IDS}], head=head_of(model)).rewired == 2
    assert copy.deepcopy(fs.remove(model)) is not None and assert_rewired(model) == 0


def test_token_bytes():
    class Tokenizer:
        all_special_ids = [0]

        def __init__(self, *pieces):
            self.pieces = pieces

        def __len__(self):
            return len(self.pieces)

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[i] for i in ids]

    assert token_bytes(Tokenizer("<s>", "Ġthe", "Ã", "a")).tolist() == [0, 4, 1, 1]
    assert token_bytes(Tokenizer("<s>", "▁the", "<0x0A>", "é")).tolist() == [0, 4, 1, 2]


def test_the_head_must_be_plain():
    from peft import LoraConfig, get_peft_model
    with pytest.raises(RefusedError, match="leave the head out of LoRA"):
        check_head(get_peft_model(model_of(), LoraConfig(r=2, target_modules=["lm_head"])))


# --- the command line -----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_command(tmp_path, capsys, monkeypatch):
    from farskip_fx.cli import main
    monkeypatch.setenv("COLUMNS", "120")        # whatever the one that runs the tests says: the table has its words whole
    save_model_and_text(tmp_path)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"""
        model: {tmp_path}/model
        data: {{files: ["{tmp_path}/*.txt"], length: 16, held_out: 0.2}}
        distill: {{inner: eager, layers: "last:0.5", teacher: copy, refit_batches: 2}}
        training: {{output_dir: {tmp_path}/run, max_steps: 2, use_cpu: true, report_to: [], save_steps: 1,
                   disable_tqdm: true}}
    """)
    assert main(["distill", str(run_file)]) == 0
    said = capsys.readouterr().out
    assert "15 rows of 16 tokens to train on, 4 held out" in said and "bits a byte" in said
    stages = ["original", "converted", "refitted"]
    assert list(json.loads((tmp_path / "run" / "stages.json").read_text())) == stages
    assert all(f" {stage} " in said for stage in [*stages, "distilled"])
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2") and (tmp_path / "run" / RUN).exists()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["farskip"]
    assert saved["layers"] == "last:0.5"
    run_file.write_text("model: x\ntraning: {}\n")
    assert main(["distill", str(run_file)]) == 2 and "unknown 'traning'" in capsys.readouterr().err
