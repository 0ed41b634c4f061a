"""A report as one HTML page that needs no network: the stream and its reads, the timelines, the details of each layer.

Contract: what ``Report.to_dict`` returns in, the whole text of a page out; the same report gives the same page. The page is
the files in ``page/``, put together, and the report as data. Names come from the model and are never markup: they travel as
JSON without ``<``, ``>`` and ``&``, and the scripts write them as text. A policy in the page lets only its own script run.

How the data is written, so that 94 layers stay small
  text     every string of a table stands once in ``strings``; a column whose name begins with ``$`` has numbers of them
  table    a list of equal dictionaries, as columns
  seconds  four significant digits, which is what the page shows; where events begin: eight, they are only drawn
"""
from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_PAGE = Path(__file__).parent / "page"
# In this order: each uses what stands in those before it.
_SCRIPTS = ("data.js", "stream.js", "timeline.js", "details.js", "main.js")
_SHOWN, _DRAWN = 4, 8       # significant digits
_AS_IT_IS = ("version", "model", "graph", "rank", "summary", "unchanged", "options", "folded", "counts", "errors")
# JSON escapes everything beyond ASCII (so also U+2028, and text that runs from right to left); these three are markup.
_MARKUP = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(report: Mapping) -> str:
    style = _read("style.css")
    script = '"use strict";\n{\n' + "\n".join(_read(name) for name in _SCRIPTS) + "}\n"
    parts = {"@POLICY@": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
                         "form-action 'none'",
             "@STYLE@": style, "@SCRIPT@": script, "@DATA@": _json(data(report))}      # data last: it may contain anything
    text = _read("index.html")
    for mark, part in parts.items():
        text = text.replace(mark, part, 1)
    return text


def data(report: Mapping) -> dict:
    """What the scripts draw: the report, smaller."""
    strings: dict[str, int] = {}
    layers = [{**{k: v for k, v in layer.items() if k not in ("reads", "blocks", "refused")},
               "refused_code": (layer["refused"] or {}).get("code"), "refused_text": (layer["refused"] or {}).get("text")}
              for layer in report["layers"]]
    reads = [{"layer": layer["index"], **read} for layer in report["layers"] for read in layer["reads"]]
    found = [block for layer in report["layers"] for block in layer["blocks"]]
    return {
        **{key: report[key] for key in _AS_IT_IS},
        "layers": _table(layers, strings), "reads": _table(reads, strings), "blocks": _table(found, strings),
        "changes": _table(report["changes"], strings),
        "collectives": _table([{"text": text} for text in report["collectives"]], strings),
        "phases": [{**phase, "bound_s": _rounded(phase["bound_s"]), "before": _timeline(phase["before"], strings),
                    "after": _timeline(phase["after"], strings)} for phase in report["phases"]],
        "seconds": {name: _rounded(seconds) for name, seconds in report["seconds"].items()},
        "strings": list(strings),
    }


def _timeline(line: Mapping, strings: dict[str, int]) -> dict:
    return {"seconds": _rounded(line["seconds"]), "exposed_s": _rounded(line["exposed_s"]), "peak_bytes": line["peak_bytes"],
            "events": _table(line["events"], strings), "collectives": _table(line["collectives"], strings)}


def _table(rows: Sequence[Mapping], strings: dict[str, int]) -> dict[str, list]:
    columns: dict[str, list] = {}
    for key in rows[0] if rows else ():
        values = [row[key] for row in rows]
        kinds = {type(v) for v in values} - {type(None)}
        if kinds and kinds <= {str, list, tuple}:
            columns[f"${key}"] = [_numbers(v, strings) for v in values]
        elif kinds == {bool}:
            columns[key] = [None if v is None else int(v) for v in values]
        else:
            columns[key] = [_rounded(v, _DRAWN if key == "start" else _SHOWN) for v in values]
    return columns


def _numbers(value: str | Iterable[str] | None, strings: dict[str, int]):
    if value is None:
        return None
    if isinstance(value, str):
        return strings.setdefault(value, len(strings))
    return [strings.setdefault(v, len(strings)) for v in value]


def _rounded(value: float | None, digits: int = _SHOWN):
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _json(value) -> str:
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for mark, escaped in _MARKUP.items():
        text = text.replace(mark, escaped)
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")
