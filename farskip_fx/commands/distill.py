"""``farskip distill``: train a converted model to agree with the original."""
from __future__ import annotations

import argparse
from pathlib import Path

from .common import screen

TEXT = """\
Convert a model and train it to agree with what it was. One file says all; run it under torchrun for several ranks, and
again after an interruption. In it:

  model: path/to/checkpoint
  data: {files: ["corpus/*.txt"], length: 1024, held_out: 0.02}
  distill: {connectivity: farskip, teacher: copy}
  training: {output_dir: run, learning_rate: 2.0e-5, max_steps: 2000, bf16: true}

distill holds the fields of farskip_fx.distill.DistillConfig, training those of transformers.TrainingArguments, and lora
(optional) those of peft.LoraConfig, for teacher: shared."""


def add(verbs: argparse._SubParsersAction) -> None:
    distill = verbs.add_parser("distill", help="train a converted model to agree with the original", description=TEXT,
                               formatter_class=argparse.RawTextHelpFormatter)
    distill.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run: model, data, distill, training")
    distill.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ..distill import command
    command.run(args.config, screen())
    return 0
