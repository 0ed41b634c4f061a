"""The page of a report: small, safe with any name, the same figures as the report; drawn and used in a real browser."""
import copy
import json
import re
import zlib

import pytest

import browser
from farskip_fx.view.html import data, page

HOSTILE = ("</script><script>window.broken=1</script>", '<img src=x onerror="window.broken=1">', "<!--<script>",
           "\x1b[31mred\x1b[0m", "\u202egnp.exe", "line\u2028break\u2029", "\"quotes' & &amp; \\u003c", "a" * 5000,
           "\U0001f600 \ud800", "]]>", "@DATA@ @SCRIPT@")


# --- reports without a model -------------------------------------------------------------------------------------

def _event(start, seconds, layer, block, part, lane="compute", names=("mm", "mul", "add")):
    return {"lane": lane, "start": start, "seconds": seconds, "names": list(names), "layer": layer, "block": block,
            "part": part}


def _timeline(layers, *, hidden, tag):
    """Thirty events a layer, as a model has; odd figures, so that one taken for another shows."""
    events, collectives, at = [], [], 0.0
    for k in range(layers):
        for i in range(27):
            part = ("all", "routed", "shared")[i % 3]
            took = 0.0012345678 * (1 + i % 7) + k * 1.23e-7
            events.append(_event(at, took, k, "attention" if part == "all" else "moe", part))
            at += took
        for i, part in enumerate(("counts", "dispatch", "combine")):
            took = 0.0098765432 * (1 + i) + k * 3.21e-7
            name = f"{tag}_{3 * k + i}"
            events.append(_event(at - (took if hidden else 0), took, k, "moe", part, lane="group0", names=(name,)))
            collectives.append({
                "name": name, "op": "all_to_all_single", "kind": "counts" if part == "counts" else "all_to_all_single",
                "group": "group0", "bytes": 4194304 + k, "seconds": took, "launch_index": 100 * k + i,
                "wait_index": 100 * k + i + 9, "hidden_s": took * hidden, "exposed_s": took * (1 - hidden),
                "free_s": took / 3, "layer": k, "block": "moe",
                "behind": [f"layers.{k}.self_attn.{n}_proj: mm" for n in "qkv"], "part": part,
                "needed_by": f"layers.{k}.mlp.experts: grouped_mm"})
            at += took * (1 - hidden)
    return {"seconds": at, "exposed_s": sum(c["exposed_s"] for c in collectives), "peak_bytes": 861348032 + layers,
            "events": sorted(events, key=lambda e: e["start"]), "collectives": collectives}


def _layer(k, *, refused=None):
    before = "the embedding" if k == 0 else f"layer {k - 1} output"
    source = f"modeling.py:{100 + k} in forward: x = self.proj(x, layer={k})"
    rest = {"layer": k, "evidence": f"topk_{k} selects", "certain": True, "operations": 60 + k, "source": source}
    return {
        "index": k, "kind": "moe", "label": f"layers.{k}.mlp", "connectivity": "farskip", "requested": True,
        "rewired": refused is None, "refused": refused,
        "reads": [{"block": "attention", "was": before, "now": before if k == 0 or refused else
                   f"{before} without the routed experts of layer {k - 1}"},
                  {"block": "moe", "was": f"layer {k} attention output",
                   "now": f"layer {k} attention output" if refused else f"{before} (before attention)"}],
        "blocks": [{"block": "attention", "label": f"layers.{k}.self_attn", "shared": False, "exchange": "",
                    "reads": f"hidden_{2 * k}", "adds": f"attn_{k}", **rest},
                   {"block": "moe", "label": f"layers.{k}.mlp", "shared": True, "exchange": f"launched_{k}",
                    "reads": f"hidden_{2 * k + 1}", "adds": f"sum_{k}", **rest}]}


def sample(layers, *, phases=("forward", "backward"), refused=()):
    reason = {"code": "not_linear", "text": "a norm stands over routed + shared experts"}
    rows = [_layer(k, refused=reason if k in refused else None) for k in range(layers)]
    return {
        "version": 1, "model": "SampleForCausalLM", "graph": "Sample.forward", "rank": 0, "unchanged": None,
        "summary": f"Sample.forward: connectivity farskip, {layers} layers", "folded": None, "errors": [],
        "options": {"connectivity": "farskip", "layers": "all", "rates": None, "strict": True}, "layers": rows,
        "changes": [{"layer": k, "block": block, "node": f"to_{k}_{block}", "op": "to", "was": f"hidden_{k}",
                     "now": "inputs_embeds", "source": f"modeling.py:{300 + k} in forward: x = x.to(torch.float32)"}
                    for k in range(layers) if k not in refused for block in ("attention", "moe") if k or block == "moe"],
        "collectives": ["all_to_all_single of float32 [?, 512] over ranks [0, 1]"] * 3 * layers,
        "phases": [{"name": name, "bound_s": 0.123456 * layers, "reason": "",
                    "before": _timeline(layers, hidden=0.0, tag=name),
                    "after": _timeline(layers, hidden=0.75, tag=name)} for name in phases],
        "counts": {"operations": 2216, "added": 0}, "seconds": {"detect": 0.0917060, "predict": 108.9413}}


def embedded(text):
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)[1])


def unpacked(table, strings):
    """What ``rows`` in data.js does."""
    def words(value):
        return None if value is None else [strings[i] for i in value] if isinstance(value, list) else strings[value]
    columns = {name.lstrip("$"): [words(v) for v in values] if name[0] == "$" else values for name, values in table.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def rounded(value, digits=4):
    if isinstance(value, dict):
        return {k: rounded(v, 8 if k == "start" else digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def seconds(value, like=None):
    """As the page writes it; ``like`` is the figure whose unit it takes."""
    value, like = rounded(value), rounded(value if like is None else like)
    if value < 5e-10:
        return "0 s"
    unit, size = next((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)) if like >= s)
    return f"{value / size:#.4g} {unit}".replace(". ", " ")


# --- without a browser -------------------------------------------------------------------------------------------

def test_size_and_determinism():
    report = sample(94)
    text = page(report)
    print(f"94 layers: {len(text.encode()) / 1e3:.0f} kB; without data {len(page(sample(0, phases=()))) / 1e3:.0f} kB")
    assert len(text.encode()) < 1e6
    assert text == page(copy.deepcopy(report))


def test_no_network():
    text = page(sample(2))
    assert not re.search(r"(?:src|href)\s*=|@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)", text.replace(
        json.dumps(embedded(text)), ""))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_scripts_write_text_only():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page(sample(1)))


def hostile(report):
    """Every string of a report that may come from a model."""
    report = copy.deepcopy(report)
    names = iter(HOSTILE * 10000)
    report["model"], report["graph"], report["summary"] = HOSTILE[0], HOSTILE[1], " ".join(HOSTILE)
    report["errors"] = list(HOSTILE)
    report["collectives"] = list(HOSTILE)
    for layer in report["layers"]:
        layer["label"] = layer["connectivity"] = next(names)
        for read in layer["reads"]:
            read["now"], read["was"] = next(names), next(names)
        for block in layer["blocks"]:
            block.update({k: next(names) for k in ("label", "evidence", "exchange", "reads", "adds", "source")})
    for change in report["changes"]:
        change.update({k: next(names) for k in ("node", "op", "was", "now", "source")})
    for phase in report["phases"]:
        for row in phase["before"]["collectives"] + phase["after"]["collectives"]:
            row.update({k: next(names) for k in ("name", "op", "kind", "needed_by")}, behind=[next(names)])
        for event in phase["before"]["events"] + phase["after"]["events"]:
            event["names"] = [next(names)]
    report["layers"][1]["refused"] = {"code": HOSTILE[0], "text": HOSTILE[1]}
    report["options"]["connectivity"] = {HOSTILE[0]: HOSTILE[1]}
    return report


def test_hostile_names_are_data():
    report = hostile(sample(3))
    text = page(report)
    part = re.search(r'id="report">(.*?)</script>', text, re.DOTALL)[1]
    assert part.isascii() and not set(part) & set("<>&\x1b")
    assert text.count("<script") == text.count("</script>") == 2
    assert "window.broken" in part and "window.broken" not in text.replace(part, "")
    assert embedded(text)["model"] == HOSTILE[0] and embedded(text)["errors"] == list(HOSTILE)


@pytest.mark.parametrize("report", [sample(3, refused=(1,)), sample(2, phases=("forward",)), sample(0, phases=())],
                         ids=["two phases", "one phase", "nothing"])
def test_figures_are_the_reports(report):
    found = embedded(page(report))
    strings = found["strings"]
    for key in ("model", "summary", "options", "counts", "folded", "unchanged", "errors", "version", "rank", "graph"):
        assert found[key] == report[key]
    assert found["seconds"] == rounded(report["seconds"])
    assert [row["text"] for row in unpacked(found["collectives"], strings)] == report["collectives"]
    assert unpacked(found["changes"], strings) == report["changes"]
    assert unpacked(found["reads"], strings) == [{"layer": r["index"], **read} for r in report["layers"] for read in r["reads"]]
    assert unpacked(found["blocks"], strings) == [block for r in report["layers"] for block in r["blocks"]]
    layers = unpacked(found["layers"], strings)
    assert [(r["index"], r["rewired"], r["refused_text"]) for r in layers] == [
        (r["index"], r["rewired"], (r["refused"] or {}).get("text")) for r in report["layers"]]
    for now, was in zip(found["phases"], report["phases"], strict=True):
        assert (now["name"], now["bound_s"], now["reason"]) == (was["name"], rounded(was["bound_s"]), was["reason"])
        for side in ("before", "after"):
            line = {**now[side], **{key: unpacked(now[side][key], strings) for key in ("events", "collectives")}}
            assert line == rounded(was[side])


def test_what_is_no_number_is_left_out():
    report = sample(1)
    report["phases"][0]["after"]["seconds"] = float("inf")
    assert data(report)["phases"][0]["after"]["seconds"] is None


# --- in a browser ------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium")


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as started:
        yield started


@pytest.fixture
def opened(chromium, tmp_path):
    def open_(report, **how):
        path = tmp_path / "report.html"
        path.write_text(page(report), encoding="utf-8")
        return chromium.open(path, **how)
    return open_


def colours_of(png):
    """Different pixels of a screenshot: RGB or RGBA, eight bits."""
    at, packed, width = 8, b"", 0
    while at < len(png):
        size, kind = int.from_bytes(png[at:at + 4], "big"), png[at + 4:at + 8]
        if kind == b"IHDR":
            width, each = int.from_bytes(png[at + 8:at + 12], "big"), {2: 3, 6: 4}[png[at + 17]]
        if kind == b"IDAT":
            packed += png[at + 8:at + 8 + size]
        at += size + 12
    raw, line = zlib.decompress(packed), width * each + 1
    # Filtered lines differ wherever pixels do: enough to tell a picture from a blank page.
    return len({raw[i:i + line] for i in range(0, len(raw), line)})


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_drawn_without_complaint(opened, dark):
    shown = opened(sample(4, refused=(2,)), dark=dark)
    assert shown.problems == []
    assert colours_of(shown.screenshot()) > 100
    ground = shown.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 300) == dark
    assert shown.run("document.querySelectorAll('.layer').length") == 4
    assert shown.run("document.querySelectorAll('canvas').length") == 4
    assert "a norm stands over routed" in shown.text("#more")
    assert "refused: a norm stands over" in shown.run("document.querySelector('#layer-2').textContent")


@needs_browser
def test_reads_begin_at_the_state_they_are_of(opened):
    """Contributions in order: attention 0, shared 0, routed 0, attention 1, ..."""
    report = sample(3)
    report["layers"][2]["reads"][0]["now"] = "layer 1 output without the MLP of layer 1"
    shown = opened(report)
    added = shown.run("[...document.querySelectorAll('g.now circle.add')].map(c => +c.getAttribute('cy'))")
    begin = shown.run("[...document.querySelectorAll('g.now circle.from')].map(c => +c.getAttribute('cy'))")
    assert added == sorted(added) and len(added) == 9 and len(begin) == 5
    # moe 0, attention 1, moe 1, attention 2, moe 2: so many contributions lie above.
    assert [sum(y < start for y in added) for start in begin] == [0, 2, 3, 4, 6]
    words = shown.run("[...document.querySelectorAll('g.now .label')].map(t => t.textContent)")
    assert words == ["before attention 0", "without routed 0", "before attention 1", "without MLP 1", "before attention 2"]
    assert shown.run("document.querySelectorAll('g.was .changed').length") == 0


@needs_browser
def test_header_shows_the_reports_figures(opened):
    report = sample(3)
    shown = opened(report)
    for number, phase in enumerate(report["phases"], 1):
        text, like = shown.text(f".card:nth-child({number})"), phase["before"]["seconds"]
        for side in ("before", "after"):
            assert seconds(phase[side]["seconds"], like) in text and seconds(phase[side]["exposed_s"], like) in text
            assert f"{phase[side]['peak_bytes'] / 1e6:.4g} MB" in text
        assert f"bound {seconds(phase['bound_s'], like)}" in text
    assert shown.text("#model") == report["model"] and shown.text("#summary") == report["summary"]


@needs_browser
def test_a_click_opens_the_details(opened):
    report = sample(4)
    shown = opened(report)
    shown.click(*shown.middle("#layer-2 .band"))
    text = shown.text("#details")
    assert "Layer 2" in text and "layer 1 output without the routed experts of layer 1" in text
    for block in report["layers"][2]["blocks"]:
        assert block["evidence"] in text and block["label"] in text and block["adds"] in text
        assert block["source"].split(": ")[0] in text and block["source"].split(": ", 1)[1] in text
    for change in (c for c in report["changes"] if c["layer"] == 2):
        assert change["node"] in text and change["was"] in text and change["now"] in text
    for phase in report["phases"]:
        for c in phase["after"]["collectives"][6:9]:
            assert seconds(c["exposed_s"]) in text and seconds(c["seconds"]) in text and seconds(c["free_s"]) in text
            assert c["needed_by"] in text and c["behind"][1] in text
    shown.click(*shown.middle(".close"))
    assert shown.run("document.querySelector('#details').hidden")
    assert shown.problems == []


@needs_browser
def test_keys(opened):
    shown = opened(sample(12))
    state = "[document.querySelector('.selected')?.id ?? null, !document.querySelector('#details').hidden]"
    steps = [("j", "layer-0", False), ("ArrowDown", "layer-1", False), ("k", "layer-0", False), ("k", "layer-0", False),
             ("Enter", "layer-0", True), ("j", "layer-1", True), ("End", "layer-11", True), ("Escape", "layer-11", False),
             ("Escape", None, False)]
    for key, layer, is_open in steps:
        shown.key(key)
        assert shown.run(state) == [layer, is_open], key
    shown.key("Tab")
    assert shown.run("document.activeElement.id") == "stream"
    assert shown.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
    shown.key("ArrowDown")
    assert shown.run("document.querySelector('#stream').getAttribute('aria-activedescendant')") == "layer-0"
    assert shown.run("document.querySelector('#layer-0').getAttribute('aria-selected')") == "true"
    assert shown.problems == []


@needs_browser
def test_hover_shows_nodes_and_source(opened):
    report = sample(3)
    shown = opened(report)
    left, top = shown.run("(() => { const b = document.querySelector('#stream svg').getBoundingClientRect();"
                          "return [b.left, b.top]; })()")
    x, y = shown.run("(() => { const b = document.querySelectorAll('g.now .name')[3].getBoundingClientRect();"
                     "return [b.left + b.width / 2, b.top + b.height / 2]; })()")
    shown.move(x, y)
    text = shown.text("#tip")
    block, change = report["layers"][1]["blocks"][0], report["changes"][1]
    assert block["reads"] in text and block["adds"] in text and block["source"] in text
    assert f"{change['node']}: {change['was']} → {change['now']}" in text
    shown.move(left - 5, top - 5)
    assert shown.run("document.querySelector('#tip').hidden")


@needs_browser
def test_timelines(opened):
    """An event tells what it is and selects its layer; the wheel zooms, dragging moves, 0 shows all again."""
    report = sample(3)
    line = report["phases"][0]["before"]
    combine = next(e for e in line["events"] if e["layer"] == 1 and e["part"] == "combine")
    collective = next(c for c in line["collectives"] if c["name"] == combine["names"][0])
    collective["name"] += "+2"          # as in the repetitions of a folded report
    shown = opened(report, height=1600)
    shown.middle("canvas")
    box = shown.run("(() => { const b = document.querySelector('canvas').getBoundingClientRect();"
                    "return [b.left, b.top, b.width]; })()")

    def at(event, height):
        # The gutter and the lanes of timeline.js.
        return box[0] + 76 + (event["start"] + event["seconds"] / 2) / line["seconds"] * (box[2] - 78), box[1] + height

    shown.move(*at(combine, 46))
    text = shown.text("#tip")
    assert "layer 1, moe, combine" in text and seconds(collective["seconds"]) in text
    assert f"exposed {seconds(collective['exposed_s'])}" in text and collective["needed_by"] in text
    picture = "document.querySelector('canvas').toDataURL()"
    shown.click(*at(combine, 46))
    assert shown.run("document.querySelector('.selected').id") == "layer-1"
    assert "Layer 1" in shown.text("#details")
    whole = shown.run(picture)
    shown.wheel(*at(combine, 20), -400)
    zoomed = shown.run(picture)
    shown.drag(*at(combine, 20), at(combine, 20)[0] - 200)
    moved = shown.run(picture)
    shown.key("0")
    assert len({whole, zoomed, moved}) == 3 and shown.run(picture) == whole
    shown.key("z")
    assert shown.run(picture) != whole
    assert shown.problems == []


@needs_browser
def test_hostile_names_in_the_page(opened):
    shown = opened(hostile(sample(3)))
    for _ in range(3):
        shown.key("j")
        shown.key("Enter")
    assert shown.problems == []
    assert shown.run("window.broken === undefined && document.querySelectorAll('img, script:not([id])').length") == 1
    words = shown.run("document.body.textContent").replace(shown.run("document.querySelector('#report').textContent"), "")
    assert not set(words) & {"\x1b", "\u202e", "\u2028"} and "\\u202egnp.exe" in words
    assert HOSTILE[1] in words


@needs_browser
@pytest.mark.parametrize("case", ["no phases", "unchanged", "one phase", "no collectives", "no attention", "folded",
                                  "no blocks", "unknown words", "a connectivity for each layer"])
def test_other_reports(opened, case):
    report = sample(3, phases=() if case == "no phases" else ("forward",))
    expected = "Layer 1"
    if case == "no phases":
        expected = "Nothing was predicted"
    if case == "unchanged":
        report.update(layers=[], changes=[], unchanged={"code": "no_stream", "text": "no residual stream here"})
        expected = "no residual stream here"
    if case == "no collectives":
        for side in ("before", "after"):
            line = report["phases"][0][side]
            line.update(collectives=[], events=[e for e in line["events"] if e["lane"] == "compute"])
        report["collectives"] = []
    if case == "no attention":
        report["layers"][1]["blocks"].pop(0)
    if case == "no blocks":
        report["layers"][1]["blocks"] = []
    if case == "folded":
        report["folded"] = {"layers": 3, "traced": 2, "period": 1}
        expected = "2 of 3 layers were traced"
    if case == "unknown words":
        report["layers"][1]["reads"][0]["now"] = "something else"
        expected = "something else"
    if case == "a connectivity for each layer":
        report["options"]["connectivity"] = {"0-1": "none", "2": "farskip"}
        expected = "0-1: none"
    shown = opened(report)
    shown.key("j")
    shown.key("j")
    shown.key("Enter")
    shown.key("z")
    assert expected in shown.text("body")
    assert shown.problems == []


@needs_browser
def test_ninety_four_layers(opened):
    shown = opened(sample(94))
    took = shown.run("""(async () => {
        const frame = () => new Promise(done => requestAnimationFrame(done));
        const times = [];
        document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
        for (let i = 0; i < 50; i++) {
            const start = performance.now();
            document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "j", bubbles: true}));
            await frame(); await frame();
            times.push(performance.now() - start);
        }
        return times;
    })()""")
    took.sort()
    print(f"50 moves, two frames each: median {took[25]:.1f} ms, longest {took[-1]:.1f} ms")
    assert shown.run("document.querySelector('.selected').id") == "layer-50"
    assert "Layer 50" in shown.text("#details")
    assert shown.problems == []
