"""``farskip distill CONFIG.yaml``: a run from one file.

    model: path/to/checkpoint             # the original
    data: {files: ["corpus/*.txt"], length: 1024, held_out: 0.02}
    lora: {r: 16, target_modules: [q_proj, v_proj]}        # optional: peft.LoraConfig, for teacher: shared
    distill: {connectivity: farskip, teacher: copy}         # DistillConfig
    training: {output_dir: run, learning_rate: 2.0e-5, max_steps: 2000, bf16: true}     # transformers.TrainingArguments

With ``refit_batches`` in distill the weights are refitted first. At the end a table compares original, converted, refitted and
distilled on the held-out rows. The distilled checkpoint is in ``output_dir``; run the same command again after an interruption,
and it goes on.
"""
from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from ..config import refuse_unknown
from ..errors import ConfigError
from .config import DistillConfig, read
from .evaluation import Evaluation, assert_rewired, evaluate, table
from .teacher import Teacher

STAGES = "stages.json"
_PARTS = ("model", "data", "lora", "distill", "training")
_DATA = {"files": None, "length": 1024, "held_out": 0.02, "tokenizer": None}


class Packed(torch.utils.data.Dataset):
    """Text in rows of one length, [rows, length] token ids; documents follow each other without a gap."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.rows = ids[:len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}


def texts(tokenizer, files: list[str], length: int, held_out: float) -> tuple[Packed, Packed, float]:
    """Packed text files: for training, the last ``held_out`` share of the rows, and the mean bytes of a token there.

    Raises:
        ConfigError: no files, or too little text.
    """
    found = sorted({path for pattern in files for path in glob.glob(pattern, recursive=True)})
    if not found:
        raise ConfigError(f"no file matches {files}")
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    documents = [Path(path).read_text(errors="replace") for path in found]
    ids = torch.tensor([i for text in documents for i in (*tokenizer(text, add_special_tokens=False)["input_ids"], *end)],
                       dtype=torch.int32)
    packed = Packed(ids, length)
    kept_out = max(1, round(held_out * len(packed)))
    if len(packed) < 2 or kept_out >= len(packed):
        raise ConfigError(f"{len(found)} files give {len(packed)} rows of {length} tokens, and held_out={held_out} leaves "
                          "none to train on: give more text or a smaller length")
    rows = packed.rows
    return (Packed(rows[:-kept_out].flatten(), length), Packed(rows[-kept_out:].flatten(), length),
            sum(len(text.encode()) for text in documents) / len(ids))


def run(path: str | Path, console: Console) -> dict:
    """Run the file at ``path``; the metrics of the last evaluation."""
    rows: dict[str, Evaluation] = {}
    trainer, tokenizer, metrics = trained(read(path), path, console, rows)
    trainer.save_model()
    rows["distilled"] = evaluation_of(metrics, trainer.model)
    console.print(table(rows))
    if trainer.args.should_save:
        tokenizer.save_pretrained(trainer.args.output_dir)
    console.print(f"distilled: {trainer.args.output_dir}; held out: {metrics['eval_bits_per_byte']:.4f} bits a byte, KL "
                  f"{metrics['eval_kl']:.4f}, the original's likeliest token in {metrics['eval_agree']:.2%}",
                  highlight=False)
    return metrics


def trained(data: dict, path: str | Path, console: Console, rows: dict[str, Evaluation] | None = None) -> tuple:
    """The run that ``data``, the contents of ``path``, describes: its trainer, tokenizer and last metrics; nothing is saved yet.

    Args:
        rows: gets the evaluation of each stage before training; those of a run that is resumed were kept in its folder.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

    from .trainer import distill
    data, text, config, arguments = checked(data, path)
    if "output_dir" not in arguments:
        raise ConfigError(f"{path}: training needs output_dir")
    args = TrainingArguments(**arguments)
    tokenizer = AutoTokenizer.from_pretrained(text["tokenizer"] or data["model"])
    train, held_out, size = texts(tokenizer, text["files"], text["length"], text["held_out"])
    model = AutoModelForCausalLM.from_pretrained(data["model"])
    if "lora" in data:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(**data["lora"]))
    console.quiet = args.process_index > 0
    console.print(f"{len(train)} rows of {text['length']} tokens to train on, {len(held_out)} held out", highlight=False)
    kept = Path(args.output_dir) / STAGES

    def measured(stage: str, model: nn.Module, teacher: Teacher) -> None:
        batches = torch.utils.data.DataLoader(held_out, args.per_device_eval_batch_size, collate_fn=default_data_collator)
        rows[stage] = evaluate(model, batches, teacher=teacher, bytes_a_token=size)
        if args.should_save:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({name: dataclasses.asdict(row) for name, row in rows.items()}))

    trainer = distill(model, train, config, args=args, eval_dataset=held_out, bytes_a_token=size, resume=True,
                      on_stage=None if rows is None else measured)
    if rows is not None and not rows and kept.exists():
        rows.update({name: Evaluation(**row) for name, row in json.loads(kept.read_text()).items()})
    return trainer, tokenizer, trainer.evaluate()


def evaluation_of(metrics: dict, model: nn.Module) -> Evaluation:
    """What Trainer's evaluation found, as a row of the table."""
    return Evaluation(tokens=int(metrics["eval_tokens"]), loss=metrics["eval_cross_entropy"], accuracy=metrics["eval_correct"],
                      bits_per_byte=metrics["eval_bits_per_byte"], kl=metrics["eval_kl"], agreement=metrics["eval_agree"],
                      rewired=assert_rewired(model))


def parse(path: str | Path) -> tuple[dict, dict, DistillConfig, dict]:
    """A run's file: all of it, the part "data" with its defaults, the options, and the training arguments.

    Raises:
        ConfigError: something is missing, unknown, or of the wrong kind.
    """
    return checked(read(path), path)


def checked(data: dict, path: str | Path) -> tuple[dict, dict, DistillConfig, dict]:
    """``parse`` of what was read from ``path``."""
    refuse_unknown(data, _PARTS, f"{path}: unknown ", "; known: ")
    for name in ("model", "data", "training"):
        if name not in data:
            raise ConfigError(f"{path} has no {name!r}; a run needs model, data and training")
    for name in ("data", "lora", "distill", "training"):
        if not isinstance(data.get(name, {}), Mapping):
            raise ConfigError(f"{path}: {name!r} must be a mapping of options")
    refuse_unknown(data["data"], _DATA, f"{path}, data: unknown ", "; known: ")
    text = {**_DATA, **data["data"]}
    if not isinstance(text["files"], list):
        raise ConfigError(f"{path}: data needs files, a list of paths or patterns")
    return data, text, DistillConfig.from_dict(data.get("distill", {})), dict(data["training"])
