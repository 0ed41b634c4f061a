"""docs/families.md: which model families of transformers are exact, and which are refused. `make families` writes it.

Each row is measured: a tiny random model of the family is compiled with each connectivity and compared with the oracle.
tests/test_families.py measures the same and compares its outcome with the committed row; so the file holds nothing that
differs between two runs or two machines (no timings, no dates, no names of graph nodes).
"""
from pathlib import Path
from typing import NamedTuple

import torch

import families
import farskip_fx as fs
import oracle as reference
from compiled import logits_of, run_each
from farskip_fx.capture import one_graph, way_to_one_graph
from farskip_fx.connectivity import BUILT_IN as CONNECTIVITIES

DOCUMENT = Path(__file__).parent.parent / "docs" / "families.md"
TOLERANCE = 1e-5
EXACT = "exact"
YES_NO = {True: "yes", False: "no"}
EVERY_FAMILY = [*families.FAMILIES, *families.MORE]

# What is not x + f(norm(x)), in a few words.
STREAM = {
    **dict.fromkeys(reference.PLAIN, "plain pre-norm"),
    **dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), "residual multiplier"),
    "afmoe": "sandwich norms",
    "cohere2_moe": "parallel blocks",
    "deepseek_v4": "hyper-connections",
    "diffusion_gemma": "sandwich norms; stream scaled",
    "doge": "scaled skip",
    "flex_olmo": "norm after each block",
    "gemma4": "sandwich norms; third block; stream scaled",
    "glm5_next": "hyper-connections",
    "inkling": "convolution after each block",
    "kolibri1": "sandwich norms",
    "nllb_moe": "encoder and decoder; cross-attention",
    "qwen4_exp": "hyper-connections; n-gram convolution",
    "switch_transformers": "encoder and decoder; cross-attention",
    # tests/more_families.py
    **dict.fromkeys(reference.MORE_SHAPES, "plain pre-norm"),
    "axk1": "sandwich norm inside the MoE",
    "beam": "sandwich norms; scaled skip",
    "hy_v4": "hyper-connections",
    "inkling2": "attention over earlier states",
    "jetmoe": "plain pre-norm; attention has experts too",
    "longcat_flash": "two attentions and MLPs a layer; MoE beside them",
    "minimax": "norms in the stream; scaled skip",
    "muse_spark": "sandwich norms; scaled skip",
    "zaya": "scaled skip with bias",
}

# Code of a refusal -> the words in the table, and what they mean for somebody who writes such a model.
REASONS = {
    "post_norm_over_sum": ("norm over the sum", """
        A norm stands over routed + shared experts, between the block and the stream. What the shared expert alone would
        add to the stream is not defined, so there is no state "without the routed experts". `ladder` and `mlp_only`
        leave out whole contributions and need none. In a model of your own: norm the two parts apart, or norm
        the stream and not the contribution."""),
    "split": ("several graphs", """
        Dynamo breaks the graph inside a layer (code that depends on values: a size, a Python branch), so no graph holds
        the stream from the embedding to the final norm. Run with `TORCH_LOGS=graph_breaks` to see the line."""),
    "no_stream": ("stream not found", """
        No chain of updates of one residual stream was found in the graph: the blocks are joined in a way that the
        backend does not understand yet."""),
    "gap": ("gap in the stream", """
        Something between two blocks works on tokens outside of any block that could be told, so what a block would read
        is not certain."""),
    "not_alternating": ("order of blocks", """
        The blocks do not come as attention (or another mixer), then MLP or MoE."""),
    "reads_two_states": ("reads two states", """
        A block reads more than one state of the stream."""),
    "parallel_block": ("parallel blocks", """
        Attention and experts lie in one block (jetmoe: its attention has experts of its own), so there is no attention
        output that the experts could skip."""),
    "no_reference": ("not checked", """
        It is rewired, but there is no reference for this family to compare with."""),
    "update_not_linear": ("update not linear", """
        The update of the stream is not linear in the contribution, so nothing can be left out of it."""),
    "shared_computation": ("shared computation", """
        Two blocks share a computation that reads the stream, so the reads cannot be changed one by one."""),
    "overwritten": ("overwritten in place", """
        A value that a rewired block would have to read is overwritten in place before it runs."""),
    "wrong": ("wrong", """
        The compiled model differs from the reference: a bug. Do not use this connectivity with this family."""),
    "no_router": ("no router found", """
        A layer has experts, but what chooses among them is not a top-k over one linear map of the state with an output
        for each expert: experts picked by token id (deepseek_v4's first layers), or a router that scores the shared
        experts too (inkling)."""),
}


class Outcome(NamedTuple):
    code: str         # "exact", or the code of the refusal
    text: str = ""    # the error, for people who run this

    @property
    def words(self) -> str:
        return EXACT if self.code == EXACT else REASONS[self.code][0]


class Row(NamedTuple):
    family: str
    stream: str
    shared: str
    traces: str
    cells: tuple[str, ...]      # one for each connectivity: "exact", or the words of the reason

    def __str__(self) -> str:
        return "| " + " | ".join((self.family, self.stream, self.shared, self.traces, *self.cells)) + " |"

    @classmethod
    def read(cls, line: str) -> "Row":
        family, stream, shared, traces, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        return cls(family, stream, shared, traces, tuple(cells))


def measure(family: str, layers=None) -> dict[str, Outcome]:
    """connectivity -> outcome."""
    model, inputs = families.tiny(family, jitter=0.1), families.inputs(family)
    settings = [{"connectivity": name, "inner": "eager", "layers": "all" if layers is None else tuple(layers)}
                for name in CONNECTIVITIES]
    found = {}
    with torch.no_grad(), one_graph(model):
        for connectivity, got in zip(CONNECTIVITIES, run_each(model, inputs, settings)):
            if isinstance(got, fs.FarskipError):
                found[connectivity] = Outcome(code_of(got), f"{type(got).__name__}: {got}")
                continue
            if connectivity == "none":
                expected = logits_of(model(**inputs))
            elif family not in reference.SHAPES | reference.MORE_SHAPES:
                found[connectivity] = Outcome("no_reference")
                continue
            else:
                expected = reference.oracle(family, model, inputs, connectivity, layers)
            scale = max(1.0, expected.abs().max().item())
            difference = (got - expected).abs().max().item() / scale
            text = f"{family} {connectivity}: differs from the oracle by {difference:.2e}"
            found[connectivity] = Outcome(EXACT) if difference <= TOLERANCE else Outcome("wrong", text)
    return found


def code_of(error: fs.FarskipError) -> str:
    if isinstance(error, fs.SplitModelError):
        return "split"
    report = error.report                           # put there by compiled.run_each
    if report.unchanged is not None:
        return report.unchanged.code
    return report.rewired.refused[0].reason.code


def row(family: str, outcomes: dict[str, Outcome]) -> Row:
    model = families.tiny(family)
    known = family in reference.SHAPES | reference.MORE_SHAPES
    shared = "?" if not known else YES_NO[any(kind["shared"] for kind in reference.layer_kinds(family, model))]
    split = any(outcome.code == "split" for outcome in outcomes.values())
    traces = "in parts" if split else "loop over experts" if way_to_one_graph(model) else "whole"
    return Row(family, STREAM[family], shared, traces,
               tuple(outcomes[name].words for name in CONNECTIVITIES))


def document(every_row: list[Row]) -> str:
    rows = [r for r in every_row if r.family in families.SPEC]
    more = [r for r in every_row if r.family in families.MORE]
    everywhere = sum(set(r.cells) == {EXACT} for r in rows)
    somewhere = sum(EXACT in r.cells[1:] and set(r.cells) != {EXACT} for r in rows)
    lines = [
        "# Model families", "",
        "Written by `make families`; do not edit. One tiny random model of each mixture-of-experts family of",
        "transformers, compiled with each connectivity and compared with an eager reference that shares no code with",
        "the compiler (`tests/oracle.py`): **exact**, or refused with the reason that stands in the cell.", "",
        f"Of {len(rows)} families {everywhere} are exact under every connectivity, {somewhere} more under some.", "",
        "*Traces*: `whole`: as one graph under a bare `torch.compile`. `loop over experts`: its experts run in a",
        "Python loop over those that got a token; inside `farskip_fx.capture.one_graph(model)` that loop runs for",
        "every expert, which gives the same numbers and one graph. `in parts`: several graphs in any case.", "",
        *table(rows), "",
        "## Also tried", "",
        f"The other {len(more)} of transformers 5.23. `?`: the reference does not know this family.", "",
        *table(more), "",
        "## What the reasons mean", "",
    ]
    used = {cell for r in every_row for cell in r.cells} - {EXACT}
    for words, meaning in REASONS.values():
        if words in used:
            names = ", ".join(r.family for r in every_row if words in r.cells)
            lines += [f"**{words}** ({names}). " + " ".join(meaning.split()), ""]
    return "\n".join(lines)


def table(rows: list[Row]) -> list[str]:
    head = ("family", "stream", "shared expert", "traces", *CONNECTIVITIES)
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *map(str, rows)]


def committed() -> dict[str, Row]:
    """The rows of the file, by family."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    rows = [Row.read(line) for line in lines]
    return {r.family: r for r in rows if r.family in families.ALL}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for family in EVERY_FAMILY:
        outcomes = measure(family)
        rows.append(row(family, outcomes))
        print(rows[-1], *sorted({o.text for o in outcomes.values() if o.text}), sep="\n    ", flush=True)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(rows))


if __name__ == "__main__":
    main()
