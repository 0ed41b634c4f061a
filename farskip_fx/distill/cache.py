"""A teacher that was computed once: its k largest log-probabilities and the mass of the tail, for each position of each row.

    build(folder, teacher, dataset, top_k=64)           # before the student is trained; every rank takes its share
    cached = CachedTeacher.open(folder, teacher.model, dataset, top_k=64)
    cached(rows=[3, 17], input_ids=ids)                 # TopK

Layout of a folder (format 1)
    rows-00000.safetensors, ...     ids [rows, length] int32, indices [rows, length, k] int32, log_probs [rows, length, k]
                                    float32, log_tail [rows, length] float32
    teacher.json                    written last: format, k, temperature, vocabulary, number of rows, length, rows a file,
                                    and the fingerprint of the model

Contract
    A row is one example of the dataset, by index, so shuffling and batch sizes may change between runs. All rows have one
    length (packed text): a position of another layout would get another context. What differs is refused: the format, k, the
    temperature, the vocabulary, the model's weights or config, the number of rows; and with each batch the token ids
    themselves are compared, which finds another tokenizer, another dataset or another order.

Bytes: 8 k + 8 for a token.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..expert_parallel import _sharded_modules
from .calibration import ranks_and_rank
from .head import base_of, check_head
from .loss import Head, TopK
from .teacher import Teacher

FORMAT = 1
INDEX = "teacher.json"
ROW = "teacher_row"                 # the key under which a batch carries its row numbers
_ROWS_A_FILE = 256


class Rows(torch.utils.data.Dataset):
    """A dataset whose examples also say which row they are."""

    def __init__(self, dataset) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ConfigError('teacher="cached" needs a dataset with a length and an index, not a stream: rows are found by '
                              'index')
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return {**self.dataset[index], ROW: index}


def with_rows(collator):
    """``collator``, handing the row numbers through."""
    def collate(examples: list[dict]) -> dict:
        rows = [example.pop(ROW) for example in examples]
        return {**collator(examples), ROW: torch.tensor(rows)}
    return collate


@torch.no_grad()
def build(folder: str | Path, teacher: Teacher, dataset, *, top_k: int, temperature: float = 1.0, batch: int = 8,
          rows_a_file: int = _ROWS_A_FILE) -> None:
    """Compute and store what ``teacher`` says about ``dataset``. Collective: each rank writes every world-size-th file.

    Args:
        folder: made if it is not there. Files of an earlier, interrupted build are written again.
        dataset: its examples have ``input_ids`` of one length.
        batch: rows in one forward.

    Raises:
        ConfigError: rows of different lengths; sharded experts (their ranks would wait for each other).
    """
    folder, model = Path(folder), teacher.model
    if next(_sharded_modules(model), None) is not None:
        raise ConfigError("a cache is built before farskip_fx.expert_parallel: ranks take different rows, and would wait "
                          "for each other in an exchange")
    folder.mkdir(parents=True, exist_ok=True)
    world, rank = ranks_and_rank()
    length, vocabulary = len(dataset[0]["input_ids"]), teacher.head.weight.shape[0]
    if top_k > vocabulary:
        raise ConfigError(f"top_k={top_k} of a vocabulary of {vocabulary}")
    files = [range(start, min(start + rows_a_file, len(dataset))) for start in range(0, len(dataset), rows_a_file)]
    for number, rows in list(enumerate(files))[rank::world]:
        ids = _ids_of(dataset, rows, length)
        parts = [_top_k(teacher, some, top_k, temperature) for some in ids.split(batch)]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        part = folder / f".{_name(number)}.partial"
        save_file({"ids": ids.int(), **found}, part, metadata={"format": str(FORMAT)})
        os.replace(part, folder / _name(number))
    if world > 1:
        dist.barrier()
    if rank == 0:
        index = {**_header(model, vocabulary, len(dataset), top_k, temperature), "length": length,
                 "rows_a_file": rows_a_file}
        part = folder / f".{INDEX}.partial"
        part.write_text(json.dumps(index, indent=1))
        os.replace(part, folder / INDEX)
    if world > 1:
        dist.barrier()


class CachedTeacher:
    """A folder that ``build`` wrote, for the dataset and the model that it was written for."""

    def __init__(self, folder: Path, index: dict, head: Head) -> None:
        self.folder, self.index, self.head = folder, index, head      # the original's head: how logits are made, checked
        self._files: dict[int, object] = {}

    @classmethod
    def open(cls, folder: str | Path, model: nn.Module, rows: int, *, top_k: int, temperature: float = 1.0) -> CachedTeacher:
        """
        Args:
            model: the original; its fingerprint is compared.
            rows: of the dataset.

        Raises:
            ConfigError: there is no complete cache, or it is another model's, dataset's or configuration's.
            RefusedError: the model's logits are not understood (see head.py).
        """
        folder = Path(folder)
        if not (folder / INDEX).exists():
            raise ConfigError(f"{folder} has no {INDEX}: it holds no complete cache of a teacher. Build it again")
        try:
            index = json.loads((folder / INDEX).read_text())
        except ValueError as error:
            raise ConfigError(f"{folder / INDEX} is damaged ({error}): build the cache again") from error
        if not isinstance(index, dict):
            raise ConfigError(f"{folder / INDEX} is damaged (it holds a {type(index).__name__}): build the cache again")
        vocabulary = base_of(model).get_output_embeddings().weight.shape[0]
        want = _header(model, vocabulary, rows, top_k, temperature)
        for name, value in want.items():
            if index.get(name) != value:
                raise ConfigError(f"the cached teacher in {folder} has {name}={index.get(name)!r}, and this run {value!r}: "
                                  "its log-probabilities are not those of this run's teacher. Use another folder")
        return cls(folder, index, check_head(model))

    def __call__(self, *, rows: Sequence[int] | Tensor, input_ids: Tensor, **_) -> TopK:
        """What the teacher says about a batch.

        Raises:
            ConfigError: ``input_ids`` are not what these rows were when the cache was built.
        """
        rows = [int(row) for row in rows]
        stored = torch.stack([self._row("ids", row) for row in rows]).long()
        if stored.shape != input_ids.shape or not torch.equal(stored, input_ids.cpu()):
            raise ConfigError(f"the batch holds other tokens than rows {rows} had when the cache in {self.folder} was built "
                              "(another tokenizer, dataset, order or padding): build the cache again")
        device = input_ids.device
        return TopK(*(torch.stack([self._row(name, row) for row in rows]).to(device, non_blocking=True)
                      for name in ("indices", "log_probs", "log_tail")))

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def _row(self, name: str, row: int) -> Tensor:
        number, inside = divmod(row, self.index["rows_a_file"])
        if number not in self._files:
            self._files[number] = safe_open(self.folder / _name(number), "pt")
        return self._files[number].get_slice(name)[inside]


def _name(number: int) -> str:
    return f"rows-{number:05}.safetensors"


def _header(model: nn.Module, vocabulary: int, rows: int, top_k: int, temperature: float) -> dict:
    return {"format": FORMAT, "vocabulary": vocabulary, "rows": rows, "top_k": top_k, "temperature": float(temperature),
            "model": fingerprint(model)}


def fingerprint(model: nn.Module) -> str:
    """Of a model's parameters: names, shapes, and 64 values of each. Not of every bit."""
    digest = hashlib.sha256()
    for name, parameter in sorted(base_of(model).named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[::max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:32]


def _ids_of(dataset, rows: range, length: int) -> Tensor:
    ids = [torch.as_tensor(dataset[row]["input_ids"]) for row in rows]
    odd = next((row for row, i in zip(rows, ids) if i.shape != (length,)), None)
    if odd is not None:
        raise ConfigError(f"row {odd} of the dataset has {len(ids[odd - rows[0]])} tokens and row 0 has {length}; a cached "
                          "teacher needs rows of one length: pack the text")
    return torch.stack(ids).long()


def _top_k(teacher: Teacher, ids: Tensor, k: int, temperature: float) -> dict[str, Tensor]:
    target = teacher(input_ids=ids.to(teacher.head.weight.device), use_cache=False)
    rows = []
    for hidden in target.hidden:        # logits of one row at a time
        log_q = (teacher.head.logits(hidden) / temperature).log_softmax(-1)
        values, indices = log_q.topk(k, -1)
        # By a sum over the others: 1 - sum of the largest would be rounding noise where the tail is small.
        tail = log_q.scatter_(1, indices, -torch.inf).logsumexp(-1)
        rows.append((indices.int(), values.float(), tail.float()))
    names = ("indices", "log_probs", "log_tail")
    return {name: torch.stack(column).cpu() for name, column in zip(names, zip(*rows))}
