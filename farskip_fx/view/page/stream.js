// The residual stream, before and after: a track that runs down, blocks that hang on it, their reads as arrows.
//
// The track is a list of contributions in the order in which they are added; state p is the track after p of them, so a
// read is a line from somewhere between contribution p-1 and p. A routed contribution comes after the shared one of its
// block: what reads "without the routed experts" starts between the two.

const WIDTH = 800, AFTER = 290, LEFT = 58, BOX = 128, BOX_WIDTH = 96, CHANNEL = {attention: 80, other: 98};
const LABEL = BOX + BOX_WIDTH + 14, LETTERS = 38;
const BOX_HEIGHT = 22, PART_HEIGHT = 19, GAP = 9, LAYER_GAP = 16, TOP = 26;

const track = layOut();

function layOut() {
  const adds = [], layers = [];
  let y = TOP;
  for (const layer of report.layers) {
    const top = y - LAYER_GAP / 2, start = adds.length, blocks = [];
    for (const block of blocksOf(layer)) {
      const parts = block.name === "attention" ? ["attention"] : block.name !== "moe" ? ["mlp"]
        : block.shared ? ["shared", "routed"] : ["routed"];
      const box = {...block, y, state: adds.length, parts: []};
      for (const part of parts) {
        const height = parts.length > 1 ? PART_HEIGHT : BOX_HEIGHT;
        box.parts.push({part, y, height, add: adds.length});
        adds.push({y: y + height - 6, layer: layer.index, block: block.name, part});
        y += height;
      }
      box.height = y - box.y;
      blocks.push(box);
      y += GAP;
    }
    y += LAYER_GAP - GAP;
    layers.push({layer, blocks, start, end: adds.length, top, bottom: y - LAYER_GAP / 2});
  }
  for (const entry of layers) {
    entry.blocks.forEach((block, i) => {
      block.was = block.read ? readOf(block.read.was, block, entry, layers, adds) : null;
      const same = entry.blocks.slice(0, i).find(b => b.found && block.found && b.found.reads === block.found.reads);
      if (same && block.was) block.was = {...block.was, state: same.state};       // parallel blocks read one state
      block.now = !block.read || block.read.now === block.read.was ? block.was
        : readOf(block.read.now, block, entry, layers, adds);
    });
  }
  return {layers, adds, height: y + 14};
}

/** The blocks of a layer as found in the graph; from what they read where nothing is known of them. */
function blocksOf(layer) {
  const read = name => layer.reads.find(r => r.block === name) ?? null;
  if (!layer.blocks.length) return layer.reads.map(r => ({name: r.block, shared: false, read: r, found: null}));
  return layer.blocks.map(found => ({name: found.block, shared: Boolean(found.shared), read: read(found.block), found}));
}

/** "layer 3 output without the routed experts of layer 3" as a place on the track. What it lacks further up stands in words. */
function readOf(text, block, entry, layers, adds) {
  const words = /^(the embedding|layer (\d+) (attention )?output)( \(before attention\))?(?: without (.*))?$/.exec(text);
  if (!words) return {state: block.state, short: plain(text, LETTERS)};
  const other = words[2] === undefined ? null : layers[layerAt.get(Number(words[2]))];
  const between = other?.blocks.findLast(b => b.name !== "attention")?.state ?? other?.end;
  let state = !other ? 0 : words[3] ? between : other.end;
  // A further mixer of a layer reads its own state; the words are those of the first one.
  if (block.name === "attention" && state === entry.start) state = block.state;
  const lacks = [...(words[5] ?? "").matchAll(/the (routed experts|MLP|attention) of layer (\d+)/g)]
    .map(m => ({what: m[1], layer: Number(m[2])}));
  const missing = add => lacks.some(l => l.layer === add.layer && (l.what === "attention" ? add.block === "attention"
    : l.what === "MLP" ? add.block !== "attention" : add.part === "routed"));
  while (state > 0 && missing(adds[state - 1])) state--;
  const name = l => `${l.what.replace(" experts", "")} ${l.layer}`;
  const short = words[4] ? `before attention ${entry.layer.index}`
    : lacks.length ? `without ${lacks.map(name).join(", ")}` : text;
  return {state, short: plain(short, LETTERS)};
}

/** Where on the track a read of state p begins: right below the last contribution. */
function beginning(state) {
  const {adds} = track;
  if (!state) return TOP - 9;
  const next = adds[state];
  return next && next.layer === adds[state - 1].layer && next.block === adds[state - 1].block
    ? (adds[state - 1].y + next.y) / 2 : adds[state - 1].y + 8;
}

const rowsOfStream = [];        // one <g> a layer and side

function drawStream() {
  const frame = $("stream");
  if (!report.layers.length) {
    $("stream-frame").replaceChildren(el("p", {class: "empty"}, report.unchanged
      ? `There is no stream to draw: ${plain(report.unchanged.text, 1000)}` : "There is no stream to draw: no layers."));
    return;
  }
  const picture = svg("svg", {width: WIDTH, height: track.height, viewBox: `0 0 ${WIDTH} ${track.height}`,
                              role: "presentation"});
  const bands = svg("g"), lines = svg("g"), hits = svg("g");
  picture.append(svg("defs", {}, arrowHead("tip-plain"), arrowHead("tip-changed"), hatch()), bands, lines, hits);
  for (const [side, x] of [["was", 0], ["now", AFTER]]) {
    const all = svg("g", {transform: `translate(${x} 0)`, class: side});
    // Adjacent states first, so that changed reads lie over them.
    all.append(svg("line", {class: "track", x1: LEFT, x2: LEFT, y1: TOP - 14, y2: track.height - 8}));
    const passed = new Set(track.layers.flatMap(l => l.blocks).filter(b => side === "now" && isChanged(b))
      .flatMap(b => skipped(b)));
    for (const entry of track.layers) for (const block of entry.blocks) all.append(drawBlock(block, entry, side, passed));
    for (const entry of track.layers) {
      for (const block of entry.blocks.filter(b => side === "now" && isChanged(b))) all.append(drawChanged(block, entry));
    }
    lines.append(all);
  }
  for (const [at, entry] of track.layers.entries()) {
    const {layer, top, bottom} = entry;
    const state = layer.refused_code ? "refused" : layer.rewired ? "rewired" : "same";
    const row = svg("g", {id: `layer-${at}`, class: `layer ${state}`, role: "option", "aria-selected": "false",
                          "aria-label": spoken(layer)},
      svg("rect", {class: "band", x: 4, y: top, width: WIDTH - 8, height: bottom - top, rx: 6}),
      ...[0, AFTER].map(x => svg("text", {class: "number", x: x + 32, y: top + LAYER_GAP / 2 + 15}, String(layer.index))),
      remarks(layer, entry));
    bands.append(row);
    rowsOfStream.push(row);
  }
  frame.append(picture);
  frame.addEventListener("click", event => {
    const at = layerUnder(event);
    if (at !== null) select(at, {open: true});
  });
  frame.addEventListener("mousemove", event => {
    const at = layerUnder(event);
    if (at === null) hideTip(); else showTip(tipOf(event, at), event.clientX, event.clientY);
  });
  frame.addEventListener("mouseleave", hideTip);
}

function isChanged(block) {
  return Boolean(block.read) && block.read.now !== block.read.was;
}

/** Contributions that a changed read passes by: they are on their way while the block runs. */
function skipped(block) {
  return track.adds.map((_, i) => i).slice(block.now.state, block.was.state);
}

function drawBlock(block, entry, side, passed) {
  const group = svg("g"), read = side === "now" ? block.now : block.was, changed = side === "now" && isChanged(block);
  if (read && !changed) {
    const y = block.y + 7;
    group.append(read.state === block.state
      ? svg("path", {class: "read", "marker-end": "url(#tip-plain)", d: `M${LEFT + 4} ${y}H${BOX - 5}`})
      : svg("path", {class: "read", "marker-end": "url(#tip-plain)", d: elbow(beginning(read.state), y, channel(block))}));
  }
  if (block.parts.length > 1) {
    group.append(svg("rect", {class: "whole-block", x: BOX - 4, y: block.y - 2.5, width: BOX_WIDTH + 8,
                              height: block.height + 5, rx: 7}));
  }
  for (const {part, y, height, add} of block.parts) {
    const at = track.adds[add].y;
    group.append(
      svg("path", {class: `write ${part}${passed.has(add) ? " late" : ""}`, d: `M${BOX} ${at}H${LEFT + 6}`}),
      svg("circle", {class: `add ${part}`, cx: LEFT, cy: at, r: 5.5}),
      svg("path", {class: `plus ${part}`, d: `M${LEFT - 2.8} ${at}h5.6M${LEFT} ${at - 2.8}v5.6`}),
      svg("rect", {class: `box ${part}`, x: BOX, y: y + 1, width: BOX_WIDTH, height: height - 2, rx: 4}),
      svg("text", {class: "name", x: BOX + BOX_WIDTH / 2, y: y + height / 2 + 4},
          part === "mlp" ? "MLP" : part === "routed" && block.parts.length === 1 ? "MoE" : part));
  }
  return group;
}

function drawChanged(block, entry) {
  const y = block.y + 7, from = beginning(block.now.state), d = elbow(from, y, channel(block));
  return svg("g", {class: "changed"},
    svg("path", {class: "halo", d}),
    svg("path", {class: "read", "marker-end": "url(#tip-changed)", d}),
    svg("circle", {class: "from", cx: LEFT, cy: from, r: 3.5}),
    svg("text", {class: "label", x: LABEL, y: y + 6}, block.now.short));
}

function channel(block) {
  return block.name === "attention" ? CHANNEL.attention : CHANNEL.other;
}

/** From the track to a channel, along it, and into the box, with round corners. */
function elbow(from, to, x) {
  const r = Math.min(6, Math.abs(to - from) / 2), turn = to >= from ? r : -r;
  return `M${LEFT + 3} ${from}H${x - r}Q${x} ${from} ${x} ${from + turn}V${to - turn}Q${x} ${to} ${x + r} ${to}H${BOX - 5}`;
}

/** Why a layer is as it is; and its connectivity, where layers have their own. */
function remarks(layer, {top, blocks}) {
  const why = layer.refused_code ? `refused: ${layer.refused_text}` : !layer.requested ? "not asked for"
    : layer.rewired || report.options.connectivity === "none" ? "" : "as the model has it";
  const own = typeof report.options.connectivity === "object" && layer.rewired ? layer.connectivity : "";
  return [why && svg("text", {class: "remark", x: AFTER + LABEL, y: top + LAYER_GAP / 2 + 15}, plain(why, LETTERS)),
          own && svg("text", {class: "remark own", x: WIDTH - 16, y: (blocks.at(-1)?.y ?? top + 9) + 15}, plain(own, 16))];
}

function arrowHead(id) {
  return svg("marker", {id, viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 8, markerHeight: 8, orient: "auto",
                        markerUnits: "userSpaceOnUse"}, svg("path", {d: "M0 0.8L7 4L0 7.2Z"}));
}

function hatch() {
  return svg("pattern", {id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)"},
    svg("line", {x1: 0, x2: 0, y1: 0, y2: 7, class: "hatch"}));
}

function spoken(layer) {
  const what = layer.refused_code ? `refused: ${plain(layer.refused_text)}` : layer.rewired ? "rewired" : "unchanged";
  return `layer ${layer.index}, ${what}; ` + layer.reads.map(r => `${plain(r.block)} reads ${plain(r.now)}`).join("; ");
}

// --- what is under the mouse ---

function inPicture(event) {
  const box = $("stream").firstElementChild.getBoundingClientRect();
  const zoom = box.width / WIDTH;
  return {x: (event.clientX - box.left) / zoom, y: (event.clientY - box.top) / zoom};
}

function layerUnder(event) {
  const {x, y} = inPicture(event);
  if (x < 0 || x > WIDTH) return null;
  const at = track.layers.findIndex(entry => y >= entry.top && y < entry.bottom);
  return at < 0 ? null : at;
}

function tipOf(event, at) {
  const {x, y} = inPicture(event), {layer, blocks} = track.layers[at];
  const block = blocks.find(b => y >= b.y && y < b.y + b.height + GAP);
  if (!block) return [[`layer ${layer.index}`, "title"], layer.label && [plain(layer.label), "code"]];
  const {found, read} = block, now = x >= AFTER;
  const edges = now && found ? layer.changes.filter(c => c.block === block.name) : [];
  return [
    [`layer ${layer.index} ${plain(block.name)}`, "title"],
    found?.label && [plain(found.label), "code"],
    read && `reads ${plain(now ? read.now : read.was)}`,
    now && read && read.now !== read.was && [`was: ${plain(read.was)}`, "soft"],
    now && layer.refused_code && `refused: ${plain(layer.refused_text)}`,
    found && [`${plain(found.reads)} → ${plain(found.adds)}, ${found.operations} operations`, "code"],
    ...edges.slice(0, 4).map(c => [`${plain(c.node)}: ${plain(c.was)} → ${plain(c.now)}`, "code"]),
    edges.length > 4 && "… more in the details",
    found?.source && [plain(found.source), "code soft"],
  ];
}
