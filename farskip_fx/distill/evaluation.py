"""How good is a converted model: loss in bits per byte, next-token accuracy, and agreement with the original.

    before = evaluate(original, batches, bytes_a_token=1.0)
    after = evaluate(student, batches, teacher=teacher, bytes_a_token=1.0)
    print_table({"original": before, "distilled": after})

Each evaluation says how many layers were really rewired, and raises where that is not what the model's conversion asks for.
"""
from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..convert import Converted, converted_of
from ..errors import WrongConnectivityError
from ..report import last_reports
from .head import check_head, hidden_states, in_eval_mode
from .loss import Dense, Head, distillation_loss
from .teacher import Teacher

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ``evaluate`` found, per token.

    Attributes:
        tokens: targets that were counted.
        loss: cross-entropy, nats.
        bits_per_byte: of the text; nan where the number of bytes is not known.
        accuracy: share of targets that were the likeliest token.
        kl: from the model to the teacher, nats; nan without a teacher.
        agreement: share of positions where the likeliest token is the teacher's; nan without a teacher.
        rewired: decoder layers that run another connectivity than the original.
    """
    tokens: int
    loss: float
    bits_per_byte: float
    accuracy: float
    kl: float
    agreement: float
    rewired: int


def evaluate(model: nn.Module, batches: Iterable[Mapping], *, teacher: Teacher | None = None, head: Head | None = None,
             bytes_a_token: float | Tensor | None = None, chunk_mb: float = 64.0) -> Evaluation:
    """Evaluate ``model`` on ``batches`` (dicts with ``input_ids``, and ``labels`` or ``attention_mask`` where they matter).

    Args:
        model: converted or not.
        teacher: for KL and agreement, see teacher.py.
        head: None: read from the model and checked, which takes one more forward.
        bytes_a_token: for bits per byte: a number, or the bytes of each token of the vocabulary (``token_bytes``).

    Raises:
        WrongConnectivityError: the model is converted, and not as many layers were rewired as its conversion says.
    """
    head = head or check_head(model)
    device, total, size = head.weight.device, None, 0.0
    with torch.no_grad(), in_eval_mode(model):
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            targets = targets_of(inputs)
            hidden, _ = hidden_states(model, **inputs, use_cache=False)
            target = Dense(hidden, head) if teacher is None else teacher(**inputs, use_cache=False)
            _, sums = distillation_loss(hidden, head, target, targets, chunk_mb=chunk_mb)
            total = sums if total is None else total + sums
            size += bytes_of(targets, bytes_a_token)
    if total is None:
        raise ValueError("there is nothing to evaluate: no batches")
    rewired = assert_rewired(model)
    found = total.means()
    return Evaluation(
        tokens=int(found["tokens"]), loss=found["cross_entropy"], accuracy=found["correct"], rewired=rewired,
        bits_per_byte=found["cross_entropy"] * found["tokens"] / math.log(2) / size if size else math.nan,
        kl=math.nan if teacher is None else found["kl"], agreement=math.nan if teacher is None else found["agree"])


def targets_of(inputs: dict) -> Tensor:
    """The next token of each position, -100 where there is none to predict; takes the labels out of ``inputs``."""
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shifted is not None:
        return shifted
    if labels is None:
        labels = labels_of(inputs)
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE)


def labels_of(inputs: Mapping) -> Tensor:
    """``input_ids``, without what the attention mask leaves out."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return ids if mask is None or mask.dim() != 2 else ids.masked_fill(mask == 0, IGNORE)


def bytes_of(targets: Tensor, bytes_a_token: float | Tensor | None) -> float:
    """Bytes of text that the targets stand for; 0 where that is not known."""
    kept = targets[targets != IGNORE]
    if bytes_a_token is None:
        return 0.0
    if isinstance(bytes_a_token, Tensor):
        return bytes_a_token.to(kept.device)[kept].sum().item()
    return kept.numel() * bytes_a_token


def token_bytes(tokenizer) -> Tensor:
    """Bytes of text of each token, [vocabulary]; special tokens stand for none.

    Byte-level vocabularies (GPT-2's and those after it) write one character for each byte; sentencepiece writes "▁" for a
    space and "<0x0A>" for a byte.
    """
    special, pieces = set(tokenizer.all_special_ids), tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    spaces = any(piece.startswith("▁") for piece in pieces)

    def size(piece: str) -> int:
        if not spaces:
            return len(piece)
        return 1 if len(piece) == 6 and piece.startswith("<0x") else len(piece.replace("▁", " ").encode())

    return torch.tensor([0.0 if i in special else float(size(piece)) for i, piece in enumerate(pieces)])


_counted: weakref.WeakKeyDictionary[Converted, int] = weakref.WeakKeyDictionary()
"""A conversion -> the layers that it rewired; its report may be forgotten when somebody asks again."""


def assert_rewired(model: nn.Module) -> int:
    """The number of rewired decoder layers of ``model``, after its first forward; 0 if it is not converted.

    Raises:
        WrongConnectivityError: that is not what its conversion says.
    """
    owner = converted_of(model)
    if owner is None or not owner.forward.config.names:
        return 0
    converted = owner.forward
    if converted not in _counted:
        report = next((r for r in reversed(last_reports(owner)) if r.marked and r.config == converted.config
                       and r.rewired is not None), None)
        if report is None:
            raise WrongConnectivityError(
                f"no graph of this model was rewired, although it is converted ({converted.config.connectivity!r}): call it "
                "once before it is asked, or look at farskip_fx.last_reports() for why")
        # A layer that is asked for may have nothing to change: "attn_only" behind a layer that stays as it is, say.
        done, want = report.rewired, converted.config.indices(len(report.layers))
        if done.refused or not done.rewired or {layer.index for layer in done.layers if layer.requested} != want:
            raise WrongConnectivityError(
                f"{done.rewired} layers are rewired, and the conversion asks for {len(want)} (connectivity "
                f"{converted.config.connectivity!r}, layers {converted.config.layers!r}){done.refusals and ': ' + done.refusals}")
        _counted[converted] = done.rewired
    return _counted[converted]


def table(rows: Mapping[str, Evaluation]) -> Table:
    """One row for each model, such as original, converted raw, refitted, distilled; differences are from the first."""
    first = next(iter(rows.values()))
    unit = "bits/byte" if not math.isnan(first.bits_per_byte) else "nats/token"
    drawn = Table(caption=f"{first.tokens} tokens")
    for name in ("", unit, "change", "accuracy", "change", "KL to original", "same top-1", "layers rewired"):
        drawn.add_column(name, justify="left" if not name else "right")
    for name, row in rows.items():
        loss, before = (r.loss if unit == "nats/token" else r.bits_per_byte for r in (row, first))
        drawn.add_row(name, f"{loss:.4f}", _change(loss, before), f"{row.accuracy:.2%}",
                      _change(row.accuracy, first.accuracy), _or_dash(row.kl, "{:.4f}"), _or_dash(row.agreement, "{:.2%}"),
                      str(row.rewired))
    return drawn


def print_table(rows: Mapping[str, Evaluation], console: Console | None = None) -> None:
    (console or Console()).print(table(rows))


def _change(value: float, before: float) -> str:
    return "" if value == before else f"{value / before - 1:+.2%}" if before else "-"


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(round(value, 4) + 0.0)      # without the sign of a zero
