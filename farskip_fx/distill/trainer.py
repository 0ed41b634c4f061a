"""``distill``: HF Trainer with another loss.

    trainer = distill(model, dataset, DistillConfig(teacher="copy"), args=TrainingArguments("run", ...))

What is ours: the loss, its metrics in the logs, and the gradients of sharded experts. Accumulation, precision, optimizer,
schedule, checkpoints and resuming, logging and torchrun are Trainer's and are set by ``TrainingArguments``.

    model (original) -> teacher -> convert the student -> DistillTrainer.train -> model (converted, trained)
"""
from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (EarlyStoppingCallback, PreTrainedModel, ProgressCallback, Trainer, TrainerCallback,
                          TrainingArguments, default_data_collator)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..convert import apply, remove
from ..data_parallel import clip_grad_norm_, data_parallel, no_sync, reduce_gradients
from ..errors import CheckpointError, ConfigError
from ..expert_parallel import _sharded_modules
from .cache import INDEX, ROW, CachedTeacher, Rows, build, with_rows
from .calibration import own_batches
from .config import DistillConfig, write
from .evaluation import assert_rewired, bytes_of, labels_of, targets_of
from .head import base_of, check_head, head_of, hidden_states
from .layers import with_chosen_layers
from .loss import NAMES, Head, Sums, distillation_loss
from .muon import MuonOf
from .refit import refit
from .states import states_loss
from .teacher import Teacher, make_teacher, require_original

Task = Callable[[nn.Module], float]
RUN = "distill.yaml"


def distill(model: nn.Module, dataset, config: DistillConfig | Mapping | None = None, *, args: TrainingArguments,
            eval_dataset=None, data_collator=None, tasks: Mapping[str, Task] | None = None,
            bytes_a_token: float | Tensor | None = None, teacher_model: nn.Module | None = None, data_parallel=None,
            prepare: Callable[[nn.Module], object] | None = None, resume: bool | str = False,
            on_stage: Callable[[str, nn.Module, Teacher], object] | None = None, **options) -> DistillTrainer:
    """Convert ``model`` in place and train it to agree with what it was.

    Args:
        model: the original, a causal language model of transformers; with PEFT adapters for teacher="shared". After
            ``expert_parallel`` if its experts are to be sharded.
        dataset: examples with ``input_ids`` (and ``labels``, ``attention_mask``), as Trainer takes them.
        config: a DistillConfig or a dict of its fields; alternatively give the fields as keywords.
        args: batch, learning rate, schedule, precision, saving, logging.
        eval_dataset: for ``trainer.evaluate()`` and ``args.eval_strategy``.
        data_collator: as in Trainer; None: stacks examples of one length.
        tasks: {name: function of the model that returns a number}: metrics "eval_NAME", for ``stop_metric``.
        bytes_a_token: for "eval_bits_per_byte", see ``evaluate``.
        teacher_model: the original, where ``model`` is a converted checkpoint that training goes on from.
        data_parallel: with sharded experts: the ranks that hold the same experts, ``mesh["dp"]`` (a mesh of one for none).
        prepare: called with the student before its conversion and after the teacher is made, to change its weights. Not in a run
            that is resumed. (A refit: ``config.refit_batches``.)
        on_stage: called before training as (stage, model, teacher), with "original", "converted" and, after a refit or
            ``prepare``, "refitted": to measure them. Not in a run that is resumed; with teacher "copy" and "int8" only.
        resume: True: from the last complete checkpoint in ``args.output_dir``, or from the beginning if there is none. A
            path: from that one.

    Returns:
        The DistillTrainer after training; the model is ``trainer.model``.

    Raises:
        ConfigError, RefusedError: what does not fit together, before anything is trained.
    """
    given = config.to_dict() if isinstance(config, DistillConfig) else dict(config or {})
    config = DistillConfig.from_dict({**given, **options})
    if config.share is not None and teacher_model is not None:
        raise ConfigError(f"layers={config.layers!r} measures the original, and with teacher_model= the student is not it any more; "
                          "give the connectivity of each layer (distill.yaml of the run before has it)")
    labelled, size = with_labels(data_collator or default_data_collator), args.per_device_train_batch_size
    config = with_chosen_layers(config, model, dataset, labelled, folder=args.output_dir, batch=size, device=args.device,
                                resume=bool(resume))
    checkpoint = last_checkpoint(args.output_dir) if resume is True else resume or None
    calibration = []
    if config.refit_batches and checkpoint is None:
        calibration = own_batches(model, dataset, labelled, count=config.refit_batches, batch=size, device=args.device,
                                  what="refit_batches")
    teacher, eval_teacher, dataset, eval_dataset, data_collator = _teachers(
        config, model, teacher_model, dataset, eval_dataset, data_collator, args)
    if prepare is not None and config.teacher == "shared":
        raise ConfigError('prepare changes the weights that teacher="shared" uses; use teacher="copy", "int8" or "cached"')
    if checkpoint is None:
        _converted(model, config, teacher, prepare, calibration, args, on_stage)
    else:
        apply(model, config.farskip())
    trainer = DistillTrainer(
        model, args, config=config, teacher=teacher, eval_teacher=eval_teacher, train_dataset=dataset,
        eval_dataset=eval_dataset, data_collator=data_collator, tasks=tasks, bytes_a_token=bytes_a_token,
        data_parallel=data_parallel)
    trainer.save_run()
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _converted(model: nn.Module, config: DistillConfig, teacher, prepare: Callable | None, calibration: list[dict],
               args: TrainingArguments, on_stage: Callable | None) -> None:
    """Convert the student; before that change its weights, as far as that is asked for."""
    chosen, looked_at = config.farskip(), on_stage is not None and config.teacher in ("copy", "int8")
    if looked_at or calibration:
        model.to(args.device)
    if looked_at:
        on_stage("original", model, teacher)
        on_stage("converted", apply(model, chosen), teacher)
        if prepare is None and not calibration:
            return
        remove(model)
    if prepare is not None:
        prepare(model)
    if calibration:
        refit(model, calibration, config=chosen, progress=args.process_index == 0,
              group=dist.group.WORLD if dist.is_initialized() else None)
    apply(model, chosen)
    if looked_at:
        on_stage("refitted", model, teacher)


def _teachers(config: DistillConfig, model: nn.Module, original: nn.Module | None, dataset, eval_dataset, collator, args):
    if config.teacher != "cached":
        teacher = make_teacher(config.teacher, model, inner=config.inner, copy_of=original)
        return teacher, teacher, dataset, eval_dataset, collator
    original = model if original is None else original
    require_original(original, of="teacher")
    opened, live = [], None
    for name, data in (("train", dataset), ("eval", eval_dataset)):
        if data is None:
            opened.append(None)
            continue
        folder = Path(config.cache) / name
        if not (folder / INDEX).exists():
            live = live or _live_teacher(original, args.device)
            build(folder, live, data, top_k=config.top_k, temperature=config.temperature,
                  batch=args.per_device_eval_batch_size)
        opened.append(CachedTeacher.open(folder, original, len(data), top_k=config.top_k, temperature=config.temperature))
    return (*opened, Rows(dataset), None if eval_dataset is None else Rows(eval_dataset),
            with_rows(collator or default_data_collator))


def _live_teacher(model: nn.Module, device: torch.device) -> Teacher:
    model.to(device).eval()
    return Teacher(model, check_head(model))


class DistillTrainer(Trainer):
    """Trainer whose loss is KL to a teacher, computed from hidden states.

    Args:
        model: the student, converted.
        config: loss, teacher, early stopping.
        teacher, eval_teacher: of the two datasets; the same but for a cache.
        Others: as in ``distill`` and Trainer.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, config: DistillConfig, teacher, eval_teacher=None,
                 tasks: Mapping[str, Task] | None = None, bytes_a_token: float | Tensor | None = None, data_parallel=None,
                 data_collator=None, **others) -> None:
        _require(args, config, tasks)
        self.distillation, self.teacher, self.eval_teacher = config, teacher, eval_teacher or teacher
        self.tasks, self.bytes_a_token = dict(tasks or {}), bytes_a_token
        if config.optimizer == "muon":
            others["optimizer_cls_and_kwargs"] = MuonOf, dict(
                lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, weight_decay=args.weight_decay)
        super().__init__(model, args, data_collator=with_labels(data_collator or default_data_collator), **others)
        self.model_accepts_loss_kwargs = True       # Trainer then counts the targets of the whole step
        self.loss_is_scaled_for_ga = True           # and compute_loss divides by that count
        self._loss_shifts_labels = True             # position 0 is no target
        self._parallel = _shard_gradients(model, args, data_parallel)
        self._sums: dict[str, Sums | None] = {"train": None, "eval": None}
        self._since: float | None = None
        self._bytes = 0.0
        self._own_names = False
        self._checked = False
        self.add_callback(_BeforeTheStep(self))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        if config.stop_metric is not None:
            self.add_callback(StopOnTask(config.stop_patience, config.stop_delta))

    # --- the loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The distillation loss of a micro-batch, summed over its tokens and divided by those of the whole step."""
        config, inputs = self.distillation, dict(inputs)
        rows, targets = inputs.pop(ROW, None), targets_of(inputs)
        part = "train" if model.training else "eval"
        teacher = self.teacher if part == "train" else self.eval_teacher
        teacher.to(targets.device)
        states = {"output_hidden_states": True} if part == "train" and config.hidden else {}
        with self.accelerator.autocast():
            target = teacher(**inputs, use_cache=False, **states) if rows is None else teacher(rows=rows, **inputs)
        hidden, output = hidden_states(model, **inputs, use_cache=False, **self._router_logits(part), **states)
        if not self._checked:
            assert_rewired(self.model)
            self._checked = True
        loss, sums = distillation_loss(
            hidden, self._head(), target, targets, temperature=config.temperature, kl=config.kl,
            cross_entropy=config.cross_entropy, items=num_items_in_batch, chunk_mb=config.chunk_mb)
        if states:
            left = 1 - self.state.global_step / max(self.state.max_steps, 1)
            loss = loss + config.hidden * left * states_loss(output.hidden_states, target.states, targets, num_items_in_batch)
        self._sums[part] = sums if self._sums[part] is None else self._sums[part] + sums
        if part == "eval" and self.bytes_a_token is not None:
            self._bytes += bytes_of(targets, self.bytes_a_token)
        if num_items_in_batch is None:      # a mean over this micro-batch, of as many as there are
            loss = loss / self.current_gradient_accumulation_steps if part == "train" else loss
        elif self.args.average_tokens_across_devices:
            # Counted over all ranks, and the ranks' gradients are averaged: what Trainer's own loss does here.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if part == "train" and config.router_aux_loss:
            loss = loss + self._auxiliary(output)
        return (loss, {}) if return_outputs else loss

    def _head(self) -> Head:
        """The student's: its tensors change place when a trainer moves or shards them. How the logits are made does not."""
        own = head_of(self.model)
        return self.teacher.head.with_weights(own.weight, own.bias)

    def _router_logits(self, part: str) -> dict:
        wanted = part == "train" and bool(self.distillation.router_aux_loss)
        asked = bool(getattr(base_of(self.model).config, "output_router_logits", False))
        return {"output_router_logits": wanted} if wanted or asked else {}

    def _auxiliary(self, output) -> Tensor:
        found = getattr(output, "aux_loss", None)
        coefficient = getattr(base_of(self.model).config, "router_aux_loss_coef", None)
        if found is None or coefficient is None:
            raise ConfigError(f"router_aux_loss={self.distillation.router_aux_loss}, but "
                              f"{type(base_of(self.model)).__name__} returns no aux_loss, or its config has no "
                              "router_aux_loss_coef; leave the option at 0")
        return self.distillation.router_aux_loss * coefficient * found / self.current_gradient_accumulation_steps

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in (ROW, "shift_labels") if name not in self._signature_columns]

    # --- sharded experts ------------------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs) -> Tensor:
        if self._parallel is None:
            return super().training_step(*args, **kwargs)
        with no_sync(self.model):       # averaged once a step, by _BeforeTheStep
            return super().training_step(*args, **kwargs)

    # --- logs -----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means("train"))
            now = time.perf_counter()
            if self._since is not None:
                logs["tokens_per_second"] = logs["tokens"] / (now - self._since)
            self._since = now
            if self._parallel is not None:
                logs["grad_norm"] = self._norm
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._sums["eval"], self._bytes = None, 0.0
        begin = time.perf_counter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self._means("eval")
        if self.bytes_a_token is not None and found:
            size = self.accelerator.reduce(torch.tensor(self._bytes, device=self.args.device), "sum").item()
            found["bits_per_byte"] = found["cross_entropy"] * found["tokens"] / math.log(2) / size
        found |= {name: float(task(self.model)) for name, task in self.tasks.items()}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        if self._since is not None:         # tokens a second are those of training
            self._since += time.perf_counter() - begin
        return output

    def _means(self, part: str) -> dict[str, float]:
        sums, self._sums[part] = self._sums[part], None
        if sums is None:
            return {}
        values = sums.values
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "sum")
        found = Sums(values).means()
        kept = ("tokens", "kl", "agree", "cross_entropy", "correct") if part == "eval" else ("tokens", "kl", "agree")
        return {name: found[name] for name in NAMES if name in kept}

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._own_names = _internal_call
        super().save_model(output_dir, _internal_call=_internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Checkpoints to resume from have the model's own names of weights, because Trainer reads them by those names.

        save_pretrained alone writes the names of the model's release, each expert by itself; Trainer (transformers 5.24)
        then finds no weights for the stacked experts, warns, and goes on with those of the original.
        """
        if not self._own_names or not isinstance(self.model, PreTrainedModel) or not self.args.should_save:
            return super()._save(output_dir, state_dict)
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)

    def _issue_warnings_after_load(self, load_result) -> None:
        """A weight that a checkpoint does not have would stay the original's."""
        state = self.model.state_dict() if load_result.missing_keys else {}
        missing = set(load_result.missing_keys)
        read = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}      # a tied one is there once
        lost = sorted(name for name in missing if name in state and state[name].data_ptr() not in read)
        if lost or load_result.unexpected_keys:
            raise CheckpointError(
                f"the checkpoint lacks {len(lost)} weights of the model ({', '.join(lost[:3])}) and has "
                f"{len(load_result.unexpected_keys)} others: it is of another model, or was written by another release. "
                "Resume from a checkpoint of this run")

    # --- the run --------------------------------------------------------------------------------------------------------

    def save_run(self) -> None:
        """Write what reproduces this run, but for model and data: the distillation's options and the training arguments."""
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / RUN, {"distill": self.distillation.to_dict(), "training": _changed(self.args)})


def with_labels(collator):
    """``collator``, with labels from ``input_ids`` and the attention mask where it makes none: Trainer counts labels."""
    def collate(examples: list[dict]) -> dict:
        batch = dict(collator(examples))
        if batch.get("labels") is None:
            batch["labels"] = labels_of(batch)
        return batch
    return collate


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of Trainer in ``folder`` that was written to its end; None: there is none.

    Trainer writes its state last; a run that was killed while it saved leaves a folder without it, or with half of it.
    """
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number is None:
            continue
        try:
            state = json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            continue
        if state.get("global_step") == int(number[1]):
            found[int(number[1])] = str(path)
    return found[max(found)] if found else None


class Progress(ProgressCallback):
    """Trainer's progress bar (steps, time left), with KL, agreement and tokens a second beside it instead of lines."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "kl" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "KL": f"{logs['kl']:.4f}", "top-1": f"{logs['agree']:.2%}"}
            if "tokens_per_second" in logs:
                shown["tok/s"] = f"{logs['tokens_per_second']:.0f}"
            self.training_bar.set_postfix(shown)
        elif any(name.startswith("eval_") for name in logs):
            super().on_log(args, state, control, logs=logs, **kwargs)


class StopOnTask(EarlyStoppingCallback):
    """Early stopping where an improvement is one of so much, *relative* to the best (the paper: 2 % of a code benchmark)."""

    def __init__(self, early_stopping_patience: int = 20, early_stopping_threshold: float = 0.02) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.best: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)       # of the checkpoint that a resumed run goes on from
        if isinstance(saved, dict):
            vars(self).update(saved["attributes"])

    def check_metric_value(self, args, state, control, metric_value) -> None:
        sign = 1 if args.greater_is_better else -1
        if self.best is None or sign * (metric_value - self.best) > self.early_stopping_threshold * abs(self.best):
            self.best, self.early_stopping_patience_counter = metric_value, 0
        else:
            self.early_stopping_patience_counter += 1

    def state(self) -> dict:
        state = super().state()
        return {**state, "attributes": {**state["attributes"], "best": self.best}}


class _BeforeTheStep(TrainerCallback):
    """Sharded experts: average the gradients over the grid of ranks, and clip by the norm over all shards."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._since = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.trainer._parallel is not None:
            reduce_gradients(self.trainer.model)
            limit = self.trainer._parallel
            self.trainer._norm = clip_grad_norm_(self.trainer.model, limit if limit > 0 else math.inf).item()


def _shard_gradients(model: nn.Module, args: TrainingArguments, group) -> float | None:
    """Prepare for sharded experts; the norm to clip at, or None for a model without shards."""
    shards = [module._farskip_experts for _, module in _sharded_modules(model)]
    if not shards:
        if group is not None:
            raise ConfigError("data_parallel is for sharded experts (call farskip_fx.expert_parallel first); without them "
                              "Trainer averages the gradients by itself")
        return None
    if shards[0].exchange == "all_reduce":
        raise ConfigError(f"exchange={shards[0].exchange!r}: Trainer gives each rank its own batch, and this exchange needs "
                          "one for all ranks of the expert group; use expert_parallel(model, group, exchange='all_to_all')")
    if args.save_strategy != "no":
        raise ConfigError("Trainer would save this rank's experts as if they were all: set save_strategy=\"no\", and save "
                          "with farskip_fx.save_checkpoint (a TrainerCallback's on_step_end is a good place)")
    data_parallel(model, group)
    limit, args.max_grad_norm = args.max_grad_norm, 0.0      # Trainer's own clipping takes this rank's norm
    return limit


def _require(args: TrainingArguments, config: DistillConfig, tasks: Mapping | None) -> None:
    if args.label_smoothing_factor:
        raise ConfigError("label_smoothing_factor belongs to a loss on labels; leave it at 0")
    if args.use_liger_kernel:
        raise ConfigError("use_liger_kernel replaces forwards of the model, and the student's is compiled; leave it out")
    if args.torch_compile:
        raise ConfigError("torch_compile would compile around the converted model; leave it out, farskip_fx compiles it")
    if args.n_gpu > 1:
        raise ConfigError("several devices in one process (nn.DataParallel) are not supported: start with torchrun, or set "
                          "CUDA_VISIBLE_DEVICES to one device")
    if config.optimizer and args.optim != _usual(args)["optim"]:
        raise ConfigError(f"optimizer={config.optimizer!r} and TrainingArguments(optim={str(getattr(args.optim, 'value', args.optim))!r}) "
                          "are two optimizers; leave one of them out")
    if config.stop_metric is None:
        return
    metric = args.metric_for_best_model
    if metric is None or metric.removeprefix("eval_") != config.stop_metric.removeprefix("eval_"):
        raise ConfigError(f"stop_metric={config.stop_metric!r} needs TrainingArguments(eval_strategy=\"steps\", "
                          f"eval_steps=..., metric_for_best_model={config.stop_metric!r}, greater_is_better=..., "
                          f"load_best_model_at_end=True), got metric_for_best_model={metric!r}")
    if args.greater_is_better is None:
        raise ConfigError(f"stop_metric={config.stop_metric!r} needs TrainingArguments(greater_is_better=True or False)")


def _usual(args: TrainingArguments) -> dict:
    """Defaults by name. (A second TrainingArguments would reset accelerate.)"""
    return {f.name: f.default for f in dataclasses.fields(args)}


def _changed(args: TrainingArguments) -> dict:
    """The training arguments that are not at their default, as plain values."""
    usual = _usual(args)
    plain = (str, int, float, bool, list, dict)
    return {name: value for name, value in args.to_dict().items()
            if name in usual and name != "hub_token" and value != usual[name] and isinstance(value, plain)}
