"""``farskip sensitivity CONFIG.yaml``: which layers of a run's model to convert, before anything is trained."""
from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..errors import ConfigError
from .calibration import some_batches
from .choice import Choice, choose, hidden_time
from .command import parse, texts
from .front import front_svg, front_table, layers_table, refusals
from .sensitivity import sensitivity


def scan(path: str | Path, console: Console, *, share: float | None = None, json: Path | None = None,
         svg: Path | None = None) -> Choice:
    """Scan the model of the run at ``path`` on its training text; print what was found.

    Args:
        share: of the hidden time; None: what the run's layers="auto:SHARE" says, else 0.9.
        json: where the scan goes, see ``Sensitivity.load``. svg: the plot of the front.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator
    data, text, config, arguments = parse(path)
    if share is None:
        share = 0.9 if config.share is None else config.share
    if not 0 < share <= 1:
        raise ConfigError(f"--share must be above 0 and at most 1, got {share}")
    for file in (json, svg):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {file.absolute().parent} to write {file.name} into")
    tokenizer = AutoTokenizer.from_pretrained(text["tokenizer"] or data["model"])
    train, _, _ = texts(tokenizer, text["files"], text["length"], text["held_out"])
    model = AutoModelForCausalLM.from_pretrained(data["model"]).eval()
    batches = some_batches(train, default_data_collator, count=config.scan_batches,
                           batch=arguments.get("per_device_train_batch_size", 8))
    found = sensitivity(model, batches, config.choices, chunk_mb=config.chunk_mb)
    if json is not None:
        found.save(json)
    console.print(layers_table(found))
    for line in refusals(found):
        console.print(line, markup=False, highlight=False)
    hidden = hidden_time(found, config.deployment)
    choice = choose(found, hidden, share)
    console.print(front_table(choice))
    if svg is not None:
        svg.write_text(front_svg(choice, f"{Path(str(data['model'])).name}: KL over hidden time"))
    where = hidden.where
    console.print(f"predicted for ep {where.ep}, {where.tokens} tokens a rank: {choice.exposed_by_none * 1e3:.3g} ms of "
                  f"communication are exposed in a forward of the original, {choice.exposed * 1e3:.3g} ms with this choice "
                  f"({choice.share:.1%} of what all layers hide). In the run's file:", highlight=False)
    console.print("distill: {connectivity: {" + ", ".join(f'"{key}": {name}' for key, name in choice.connectivity.items()) + "}}",
                  markup=False, highlight=False, soft_wrap=True)
    return choice
