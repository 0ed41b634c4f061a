"""Tasks of lm-eval (EleutherAI's harness: ``pip install farskip_fx[eval]``) on a converted model, `generate` included.

    lm_eval(model, tokenizer, ["gsm8k", "arc_easy"], limit=200)     # {"gsm8k": {"exact_match,strict-match": 0.61, ...}, ...}
    distill(..., tasks={"gsm8k": lm_eval_task("gsm8k", tokenizer, "exact_match,strict-match", limit=200)})

The harness calls the model that it is given: likelihoods by ``model(...)``, answers by ``model.generate(...)``. Afterwards the
number of rewired layers is compared with what the model's conversion says. (``lm_eval --model hf --model_args pretrained=FOLDER``
loads a model by itself, and refuses a converted checkpoint.) Under torchrun each rank runs all of it.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ConfigError
from .evaluation import assert_rewired
from .head import in_eval_mode


def lm_eval(model: nn.Module, tokenizer, tasks: Sequence[str | dict], *, limit: int | float | None = None,
            num_fewshot: int | None = None, batch_size: int | str = 1, max_length: int | None = None,
            **options) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval on ``model``, converted or not.

    Args:
        model: a causal language model of transformers, with PEFT adapters or without.
        tasks: names, or task configurations, as ``lm_eval.simple_evaluate`` takes them.
        limit: so many documents of each task; below 1: a share of them.
        num_fewshot, batch_size, max_length: as in lm-eval.
        options: others of ``lm_eval.simple_evaluate`` (``gen_kwargs``, ``apply_chat_template``, ``confirm_run_unsafe_code``).

    Returns:
        {task: {metric: value}}; a metric is "acc", or "exact_match,strict-match" where lm-eval filtered the answers.

    Raises:
        ConfigError: lm-eval is not installed.
        WrongConnectivityError: the model is converted, and not as many layers were rewired as its conversion says.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(f"tasks need lm-eval, and it cannot be imported ({error}): pip install 'farskip_fx[eval]'") from error
    with in_eval_mode(model), _own_randomness():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length)
        found = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, log_samples=False,
                                bootstrap_iters=0, **options)
    assert_rewired(model)
    return {task: {name.removesuffix(",none"): value for name, value in metrics.items()
                   if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in name
                   and name not in ("sample_len", "sample_count")}
            for task, metrics in found["results"].items()}


def lm_eval_task(task: str | dict, tokenizer, metric: str | None = None, **options) -> Callable[[nn.Module], float]:
    """One metric of one task, as a function of the model: for ``distill(tasks={"name": ...})`` and early stopping.

    Args:
        metric: as ``lm_eval`` names it; None: the only one.
        options: of ``lm_eval``.
    """
    def measured(model: nn.Module) -> float:
        results = lm_eval(model, tokenizer, [task], **options)
        name = task if isinstance(task, str) else task["task"]
        found = results[name]
        if metric is None and len(found) == 1:
            return float(*found.values())
        if metric not in found:
            raise ConfigError(f"task {name!r} has metric={metric!r} not among its metrics: {', '.join(found)}. Choose one of them")
        return float(found[metric])
    return measured


@contextmanager
def _own_randomness() -> Iterator[None]:
    """lm-eval seeds all generators; a training run around it must go on with its own numbers."""
    import numpy
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
