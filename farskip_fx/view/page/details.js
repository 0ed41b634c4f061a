// What is known of one layer, and what is known of all: panels of text.

function details(at) {
  const layer = report.layers[at];
  const state = layer.refused_code ? ["refused", "refused"] : layer.rewired ? ["rewired", "rewired"]
    : [layer.requested ? "as the model has it" : "not asked for", "same"];
  return [
    el("div", {class: "details-head"}, el("h3", {}, `Layer ${layer.index}`), el("span", {class: `state ${state[1]}`}, state[0]),
       el("button", {type: "button", class: "close", "aria-label": "Close the details", title: "Close (Esc)"}, "×")),
    el("p", {class: "under"}, [layer.label && code(layer.label), " ", `connectivity ${plain(layer.connectivity)}`]),
    layer.refused_code && el("p", {class: "refusal"}, plain(layer.refused_text, 2000), " ", code(layer.refused_code)),
    ...track.layers[at].blocks.map(block => blockPanel(layer, block)),
    ...report.phases.map(phase => exchangePanel(phase, layer.index)),
  ].filter(Boolean);
}

function blockPanel(layer, {name, found, read}) {
  const edges = layer.changes.filter(c => c.block === name);
  const facts = [];
  if (read) {
    facts.push(["reads", plain(read.now)]);
    if (read.now !== read.was) facts.push(["was", el("s", {}, plain(read.was))]);
  }
  if (found) {
    if (found.evidence) facts.push(["known by", plain(found.evidence) + (found.certain ? "" : " (not certain)")]);
    facts.push(["in the graph", code(found.reads), " → ", code(found.adds), `, ${found.operations} operations`]);
    if (found.exchange) facts.push(["exchange", code(found.exchange)]);
    if (found.label) facts.push(["module", code(found.label)]);
    if (found.source) facts.push(["source", source(found.source)]);
  }
  return el("section", {class: "block"},
    el("h4", {}, el("i", {class: `swatch ${name === "moe" ? "routed" : name === "mlp" ? "mlp" : "attention"}`}),
       name !== "moe" ? plain(name) : found?.shared ? "MoE, with a shared expert" : "MoE"),
    el("dl", {}, facts.map(([term, ...what]) => [el("dt", {}, term), el("dd", {}, what)]).flat()),
    edges.length ? el("div", {class: "edges"}, el("p", {class: "term"}, "edges that lead elsewhere now"),
      el("ul", {}, edges.map(edge => el("li", {}, code(`${edge.node} (${edge.op})`), " reads ",
        el("code", {class: "new"}, plain(edge.now)), ", was ", el("s", {}, code(edge.was)),
        edge.source ? source(edge.source) : null)))) : null);
}

function code(name) {
  return el("code", {}, plain(name));
}

/** "file:line in function: code" on two lines. */
function source(text) {
  const cut = text.indexOf(": ");
  return el("span", {class: "source"}, el("span", {}, plain(cut < 0 ? text : text.slice(0, cut))),
            cut < 0 ? null : el("code", {}, plain(text.slice(cut + 2), 500)));
}

function exchangePanel(phase, index) {
  const own = side => phase[side].collectives.filter(c => c.layer === index);
  const before = own("before"), after = own("after");
  if (!before.length && !after.length) return null;
  const body = paired(before, after).flatMap(([was, now]) => {
    const one = now ?? was, far = [code(one.op), one.needed_by ? `, needed by ${plain(one.needed_by)}` : "",
      now?.behind.length ? el("div", {}, `behind it: ${now.behind.map(n => plain(n)).join("; ")}`) : null];
    return [
      el("tr", {}, el("th", {scope: "row"}, el("i", {class: `swatch ${partOf({...one})}`}), plain(one.part || one.kind)),
         el("td", {}, bytes(one.bytes)), el("td", {}, seconds(one.seconds)), el("td", {}, was ? seconds(was.exposed_s) : "–"),
         el("td", {class: "figure"}, now ? seconds(now.exposed_s) : "–"), el("td", {}, seconds(one.free_s))),
      el("tr", {class: "far"}, el("td", {colspan: "6"}, far)),
    ];
  });
  return el("section", {class: "block"}, el("h4", {}, `Collectives, ${plain(phase.name)}`),
    el("table", {}, el("thead", {}, el("tr", {}, ["", "bytes", "takes", "exposed before", "exposed after", "could hide"]
      .map(text => el("th", {scope: "col"}, text)))), el("tbody", {}, body)));
}

/** The collectives of a layer before and after, by part and their order in it. */
function paired(before, after) {
  const left = [...before];
  const pairs = after.map(now => {
    const i = left.findIndex(was => was.block === now.block && was.part === now.part && was.kind === now.kind);
    return [i < 0 ? null : left.splice(i, 1)[0], now];
  });
  return [...pairs, ...left.map(was => [was, null])];
}

// --- what is true of all ---

function drawHeader() {
  document.title = report.model ? `${plain(report.model)} – farskip_fx` : "farskip_fx report";
  $("model").textContent = plain(report.model || report.graph || "graph");
  $("summary").textContent = plain(report.summary, 1000);
  const {folded, unchanged, errors, options} = report;
  const connectivity = typeof options.connectivity === "string" ? options.connectivity
    : Object.entries(options.connectivity).map(([k, v]) => `${k}: ${v}`).join(", ");
  $("notes").append(...[
    el("li", {}, "connectivity ", el("b", {}, plain(connectivity))), el("li", {}, "rank ", el("b", {}, String(report.rank))),
    el("li", {}, "graph ", el("b", {}, plain(report.graph, 80))),
    folded && el("li", {class: "notice"}, `${folded.traced} of ${folded.layers} layers were traced, the others repeat ` +
                 (folded.period > 1 ? `the last ${folded.period} of them` : "the last of them")),
    unchanged && el("li", {class: "notice"}, `nothing was rewired: ${plain(unchanged.text, 1000)}`),
    ...errors.map(e => el("li", {class: "notice"}, plain(e, 1000)))].filter(Boolean));
  if (!report.phases.length) {
    $("phases").append(el("p", {class: "empty"}, "Nothing was predicted: the report shows the rewiring alone."));
  }
  for (const phase of report.phases) $("phases").append(card(phase));
}

/** A phase: two bars on one scale, what is exposed hatched, and the bound as a line. */
function card(phase) {
  const most = Math.max(phase.before.seconds, phase.after.seconds, phase.bound_s) || 1;
  const time = s => seconds(s, phase.before.seconds);
  const bar = side => {
    const line = phase[side], whole = el("div", {class: "whole"}), exposed = el("div", {class: "exposed"});
    whole.style.width = `${100 * line.seconds / most}%`;
    exposed.style.width = `${line.seconds ? 100 * line.exposed_s / line.seconds : 0}%`;
    whole.append(exposed);
    const room = el("div", {class: "room"}, whole);
    if (side === "after") {
      const bound = el("div", {class: "bound", title: `bound ${time(phase.bound_s)}`});
      bound.style.left = `${100 * phase.bound_s / most}%`;
      room.append(bound);
    }
    return el("tr", {class: side}, el("th", {scope: "row"}, side), el("td", {class: "time"}, time(line.seconds)),
      el("td", {class: "bars", "aria-hidden": "true"}, room), el("td", {}, time(line.exposed_s)),
      el("td", {}, bytes(line.peak_bytes)));
  };
  return el("section", {class: "card"},
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {scope: "col", class: "phase-name"}, plain(phase.name)),
        el("th", {scope: "col"}, "predicted"), el("td", {}), el("th", {scope: "col"}, "exposed"),
        el("th", {scope: "col"}, report.folded ? "peak, traced layers" : "peak memory"))),
      el("tbody", {}, bar("before"), bar("after"))),
    el("p", {class: "bound-words"}, "bound ", el("b", {}, time(phase.bound_s)), ": no order of the rewired graph is faster",
       phase.reason ? `; the order stayed: ${plain(phase.reason)}` : ""));
}

function drawGuide() {
  const item = (kind, ...text) => el("li", {}, el("i", {class: `sample ${kind}`}), el("span", {}, text));
  const refused = report.layers.some(l => l.refused_code), twice = report.blocks.some(b => b.shared);
  $("guide").append(...[
    el("h3", {}, "How to read this"),
    el("p", {}, "The track is the residual stream and runs down. Every block reads a state of it and adds its contribution",
       " at a plus."),
    el("ul", {}, item("plain", "a read as the model has it"),
       item("changed", "a read that is another one now: it begins at the state that the block reads"),
       item("late", "a contribution that a later block does not wait for: it may be on its way"),
       refused && item("refused", "a layer that was refused: it stays as the model has it")),
    twice && el("p", {}, "An MoE adds twice: its shared expert, then its routed experts. A read that lacks the routed experts",
       " alone begins between the two."),
    el("p", {class: "soft"}, "Select a layer for its reads, the evidence, source lines and collectives."),
    el("h3", {}, "Words"),
    el("dl", {},
      ...[["exposed", "communication during which no compute runs"],
          ["bound", "no order of the rewired graph is faster, on this device and link"],
          ["could hide", "compute that neither needs a collective's result nor is needed for its launch"],
          ["before", report.seconds.predict === undefined ? "the rewired graph in Inductor's order"
            : "the original connectivity as stock Inductor runs it"]].flatMap(([a, b]) => [el("dt", {}, a), el("dd", {}, b)])),
  ].filter(Boolean));
}

function drawMore() {
  const {counts, options, collectives} = report;
  const refused = report.layers.filter(l => l.refused_code);
  const list = entries => el("dl", {class: "facts"},
    entries.flatMap(([name, value]) => [el("dt", {}, plain(name)), el("dd", {}, value)]));
  const value = v => v === null ? "–" : typeof v === "object" ? plain(JSON.stringify(v), 2000) : plain(v);
  const fold = (title, open, ...content) => el("details", open ? {open: ""} : {}, el("summary", {}, title), ...content);
  $("more").append(...[
    refused.length ? fold("Layers that were refused", true, el("ul", {class: "refusals"}, refused.map(layer => {
      const go = el("button", {type: "button"}, `layer ${layer.index}`);
      go.addEventListener("click", () => select(layerAt.get(layer.index), {open: true}));
      return el("li", {}, go, " ", plain(layer.refused_text, 2000), " ", code(layer.refused_code));
    }))) : null,
    fold("What every rank must agree on", false,
      el("p", {}, "Ranks whose options or list of collectives differ would wait for each other without end."),
      list(Object.entries(options).map(([k, v]) => [k, value(v)])),
      el("h4", {}, "Collectives of the traced graph, in their order"),
      collectives.length ? el("ol", {class: "agreed"}, collectives.map(c => el("li", {}, plain(c.text))))
        : el("p", {}, "none: nothing is exchanged between ranks in this graph")),
    fold("Counts, and the time that the passes took", false,
      list(Object.entries(counts).map(([k, v]) => [k.replaceAll("_", " "), value(v)])),
      list(Object.entries(report.seconds).map(([k, s]) => [k, seconds(s)]))),
  ].filter(Boolean));
}
