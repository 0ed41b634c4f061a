"""What one compile shows to whoever looks: ``tlparse`` (run with ``TORCH_TRACE=folder``), and ``dump_graphs``.

Pages in tlparse, beside PyTorch's own of the same compile: ``farskip_before_normalize``, ``farskip_after_normalize``,
``farskip_after_rewire``, ``farskip_before_schedule_forward``, ..., ``farskip_report``. Nothing is written for a reader who is
not there.
"""
from __future__ import annotations

import dataclasses
import json

from torch.fx import GraphModule

from . import dumps
from .passes._torch import readable, trace_artifact
from .report import Report


class Shown:
    """One compile. Handed on, and not looked up: a backward may be compiled on another thread, and later."""

    def __init__(self, report: Report, example_inputs: list) -> None:
        self._report = report
        self._dump = dumps.begin(report.graph, example_inputs, rank=report.rank)
        self._scheduled = 0
        self._reported = False

    @property
    def uuid(self) -> str:
        """For the key of Inductor's cache: a graph that it finds there is not scheduled, and there were nothing to dump."""
        return self._dump.uuid if self._dump is not None else ""

    def graph(self, stage: str, gm: GraphModule) -> None:
        """``stage``: "before_normalize", say; no two of one compile have the same."""
        trace_artifact(f"farskip_{stage}", lambda: readable(gm))
        if self._dump is not None:
            self._dump.graph(stage, gm, changes=[dataclasses.asdict(change) for change in self._report.changes])

    def schedule(self, when: str, gm: GraphModule) -> None:
        """``when``: "before" or "after". The forward is scheduled first."""
        name = ("forward", "backward")[self._scheduled] if self._scheduled < 2 else f"graph_{self._scheduled}"
        self.graph(f"{when}_schedule_{name}", gm)
        self._scheduled += when == "after"
        if self._reported and when == "after":      # a backward that is compiled when it first runs
            self.report()

    def report(self) -> None:
        """tlparse 0.4 shows text and JSON. The page is a text there, to be saved as ``.html``."""
        self._reported = True
        trace_artifact("farskip_report", lambda: str(self._report))
        trace_artifact("farskip_report_data", lambda: json.dumps(self._report.to_dict()), encoding="json")
        trace_artifact("farskip_report.html", self._page)

    def _page(self) -> str:
        from .view.html import page
        return page(self._report.to_dict())


def nobody(stage: str, gm: GraphModule) -> None:
    """Takes the place of ``Shown.graph`` where no one is to look."""
