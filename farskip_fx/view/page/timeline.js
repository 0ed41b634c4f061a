// Predicted timelines: one canvas each, compute lane and one lane a link. Before and after of a phase share their scale and
// move together; zoomed to a layer each shows that layer, so one is then ahead of the other by its `shift`.

const GUTTER = 76, LANE = 30, LINK = 20, SPACE = 5, AXIS = 20, HEAD = 4, MOST_ZOOM = 2e4;

const pairs = report.phases.map(phase => {
  const lanes = [...new Set(["compute", ...phase.before.events.map(e => e.lane), ...phase.after.events.map(e => e.lane)])];
  const span = Math.max(phase.before.seconds, phase.after.seconds, ...[phase.before, phase.after].map(last)) || 1;
  return {phase, lanes, span, from: 0, to: span, views: []};
});

function last(line) {
  return line.events.reduce((most, e) => Math.max(most, e.start + e.seconds), 0);
}

let colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of [...Object.keys(PARTS), "ink", "soft", "line", "ground", "idle", "accent"]) {
    colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

function drawTimelines() {
  const frame = $("timelines");
  if (!pairs.length) {
    frame.append(el("p", {class: "empty"}, "Nothing was predicted: the report has no phases."));
    return;
  }
  for (const pair of pairs) {
    const figure = el("div", {class: "phase"}, el("h3", {}, plain(pair.phase.name)));
    for (const side of ["before", "after"]) {
      const view = makeView(pair, side), like = pair.phase.before.seconds;
      pair.views.push(view);
      figure.append(el("div", {class: "view"}, el("div", {class: "caption"}, el("strong", {}, side),
        el("span", {}, seconds(pair.phase[side].seconds, like)),
        el("span", {}, `exposed ${seconds(pair.phase[side].exposed_s, like)}`)), view.canvas));
    }
    frame.append(figure);
  }
  new ResizeObserver(() => redraw()).observe(frame);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redraw(); });
  drawLegend();
}

function makeView(pair, side) {
  const line = pair.phase[side];
  const height = HEAD + LANE + (pair.lanes.length - 1) * (LINK + SPACE) + AXIS;
  const canvas = el("canvas", {tabindex: "0", role: "img", "aria-label":
    `${plain(pair.phase.name)} ${side}: ${seconds(line.seconds)}, communication exposed for ${seconds(line.exposed_s)}`});
  canvas.style.height = `${height}px`;
  const lanes = pair.lanes.map((name, i) => ({
    name, top: i ? HEAD + LANE + SPACE + (i - 1) * (LINK + SPACE) : HEAD, height: i ? LINK : LANE,
    events: line.events.filter(e => e.lane === name).sort((a, b) => a.start - b.start), byLayer: new Map()}));
  for (const {events, byLayer} of lanes) {
    for (const event of events) byLayer.set(event.layer, [...byLayer.get(event.layer) ?? [], event]);
  }
  const view = {pair, side, line, canvas, height, lanes, shift: 0, idle: idleOf(lanes[0].events, line.seconds),
                exchange: exchanges(line)};
  listen(view);
  return view;
}

/** Where the compute lane stands still. */
function idleOf(events, end) {
  const gaps = [];
  let at = 0;
  for (const event of events) {
    if (event.start - at > end * 1e-6) gaps.push([at, event.start]);
    at = Math.max(at, event.start + event.seconds);
  }
  if (end - at > end * 1e-6) gaps.push([at, end]);
  return gaps;
}

/** The collective that an event of a link is. A repetition of a folded report has "+3", say, behind its name. */
function exchanges(line) {
  const known = new Map(line.collectives.map(c => [`${c.layer} ${c.name.replace(/\+\d+$/, "")}`, c]));
  return event => known.get(`${event.layer} ${event.names[0]}`);
}

// --- drawing ---

let waiting = false;

function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; paintAll(); });
}

function paintAll() {
  for (const pair of pairs) for (const view of pair.views) paint(view);
}

function paint(view) {
  const {canvas, pair, height} = view, width = canvas.clientWidth, dots = devicePixelRatio || 1;
  if (!width) return;
  const [from, to] = shown(view), scale = (width - GUTTER - 2) / (to - from), x = s => GUTTER + (s - from) * scale;
  const [all, gaps] = picturesOf(view, width, dots, from, to, scale, x);
  if (canvas.width !== all.width || canvas.height !== all.height) { canvas.width = all.width; canvas.height = all.height; }
  const c = scaledContext(canvas, dots);
  c.clearRect(0, 0, width, height);
  c.drawImage(all, 0, 0, width, height);
  if (current.at === null) c.drawImage(gaps, 0, 0, width, height);
  c.beginPath(); c.rect(GUTTER, 0, width - GUTTER, height); c.clip();
  if (current.at !== null) {
    const index = report.layers[current.at].index, own = view.lanes.map(l => l.byLayer.get(index) ?? []);
    c.globalAlpha = 0.7; c.fillStyle = colours.ground;
    c.fillRect(GUTTER, HEAD, width - GUTTER, height - HEAD - AXIS);
    c.globalAlpha = 1;
    c.drawImage(gaps, 0, 0, width, height);
    view.lanes.forEach((lane, i) => { bars(c, lane, own[i], x, scale, width); underline(c, lane, own[i], x); });
  }
  mark(c, view, x(view.line.seconds), colours.ink, []);
  if (view.side === "after") mark(c, view, x(pair.phase.bound_s), colours.soft, [3, 3]);
}

/** Everything but the selection, and the gaps apart: kept until something else than the selection changes. */
function picturesOf(view, width, dots, from, to, scale, x) {
  const key = [width, dots, from, to, colours.ground].join();
  if (view.kept?.key === key) return view.kept.pictures;
  const pictures = view.kept?.pictures ?? [0, 1].map(() => document.createElement("canvas"));
  const [c, gaps] = pictures.map(picture => {
    picture.width = Math.round(width * dots); picture.height = Math.round(view.height * dots);
    return scaledContext(picture, dots);
  });
  axis(c, view, width, x);
  for (const one of [c, gaps]) { one.beginPath(); one.rect(GUTTER, 0, width - GUTTER, view.height); one.clip(); }
  idle(gaps, view, x);
  for (const lane of view.lanes) {
    let end = firstAfter(lane.events, from);
    const start = end;
    while (end < lane.events.length && lane.events[end].start <= to) end++;
    bars(c, lane, lane.events.slice(start, end), x, scale, width);
  }
  view.kept = {key, pictures};
  return pictures;
}

function scaledContext(canvas, dots) {
  const c = canvas.getContext("2d");
  c.reset();
  c.setTransform(dots, 0, 0, dots, 0, 0);
  return c;
}

function bars(c, lane, events, x, scale, width) {
  for (const event of events) {
    const wide = event.seconds * scale, left = x(event.start);
    c.fillStyle = colours[partOf(event)];
    // A hair's breadth between neighbours where there is room for it.
    c.fillRect(left, lane.top, Math.max(wide - (wide > 4 ? 1 : 0), 0.6), lane.height);
    if (wide > 34) name(c, event, lane, Math.max(left, GUTTER), Math.min(left + wide, width));
  }
}

function name(c, event, lane, left, right) {
  const text = event.layer === null ? "" : `${event.layer} ${lane.height === LANE ? SHORT[partOf(event)] : ""}`;
  c.font = "11px system-ui, sans-serif";
  c.textBaseline = "middle"; c.textAlign = "left"; c.fillStyle = colours.ground;
  if (text && c.measureText(text).width < right - left - 8) c.fillText(text, left + 4, lane.top + lane.height / 2 + 0.5);
}

const SHORT = {attention: "attention", routed: "routed", shared: "shared", mlp: "MLP"};

/** Under the events of the selected layer, so that thin ones are found. */
function underline(c, lane, events, x) {
  c.fillStyle = colours.accent;
  for (const event of events) {
    c.fillRect(x(event.start), lane.top + lane.height + 0.5, Math.max(x(event.start + event.seconds) - x(event.start), 2), 3);
  }
}

function idle(c, view, x) {
  const lane = view.lanes[0], [begin, end] = shown(view);
  c.fillStyle = colours.idle; c.strokeStyle = colours.idle; c.lineWidth = 1;
  for (const [from, to] of view.idle) {
    if (to < begin || from > end) continue;
    const left = Math.max(x(from), GUTTER - 20), right = Math.min(x(to), view.canvas.clientWidth + 20), wide = right - left;
    c.globalAlpha = wide < 12 ? 0.4 : 0.16; c.fillRect(left, lane.top, Math.max(wide, 0.6), lane.height);
    c.globalAlpha = 1;
    if (wide < 12) continue;
    c.save();
    c.beginPath(); c.rect(left, lane.top, wide, lane.height); c.clip();
    c.beginPath();
    for (let at = left - lane.height; at < right; at += 6) {
      c.moveTo(at, lane.top + lane.height); c.lineTo(at + lane.height, lane.top);
    }
    c.stroke(); c.restore();
  }
}

function axis(c, view, width, x) {
  const {lanes, height} = view, [from, to] = shown(view), step = nice((to - from) / Math.max(2, (width - GUTTER) / 110));
  c.font = "11px system-ui, sans-serif"; c.textBaseline = "middle"; c.textAlign = "left";
  lanes.forEach((lane, i) => {
    c.fillStyle = colours.soft;
    c.fillText(i === 0 ? "compute" : lanes.length > 2 ? `link ${i}` : "link", 0, lane.top + lane.height / 2);
    c.fillStyle = colours.line;
    c.fillRect(GUTTER, lane.top + lane.height, width - GUTTER, 1);
  });
  const bottom = height - AXIS;
  for (let at = Math.ceil(Math.max(from, 0) / step) * step; at <= to; at += step) {
    c.fillStyle = colours.line; c.fillRect(x(at), HEAD, 1, bottom);
    c.fillStyle = colours.soft;
    const text = tick(at, step);
    if (x(at) + c.measureText(text).width + 4 < width) c.fillText(text, x(at) + 4, bottom + 11);
  }
}

function mark(c, view, at, colour, dashes) {
  c.strokeStyle = colour; c.lineWidth = 1.5; c.setLineDash(dashes);
  c.beginPath(); c.moveTo(at, 0); c.lineTo(at, view.height - AXIS + 4); c.stroke(); c.setLineDash([]);
}

function nice(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return power * [1, 2, 5, 10].find(m => m * power >= step);
}

/** As many decimals as the step needs. */
function tick(at, step) {
  const [unit, size] = TIMES.find(([, size]) => step >= size * 0.05) ?? TIMES.at(-1);
  return `${(at / size).toFixed(Math.max(0, Math.ceil(-Math.log10(step / size) - 1e-9)))} ${unit}`;
}

/** The first event that ends after `from`: events of a lane do not overlap. */
function firstAfter(events, from) {
  let low = 0, high = events.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (events[middle].start + events[middle].seconds < from) low = middle + 1; else high = middle;
  }
  return low;
}

// --- zoom: of all phases alike ---

function shown(view) {
  return [view.pair.from + view.shift, view.pair.to + view.shift];
}

/** `at`: what stays where it is. */
function zoom(pair, factor, at) {
  const span = Math.min(pair.span, Math.max(pair.span / MOST_ZOOM, (pair.to - pair.from) / factor));
  const share = (at - pair.from) / (pair.to - pair.from);
  show(pair, at - share * span, at + (1 - share) * span);
}

function show(pair, from, to) {
  const span = Math.min(pair.span, to - from);
  pair.from = Math.min(Math.max(0, from), pair.span - span);
  pair.to = pair.from + span;
  redraw();
}

function zoomAll(factor) {
  for (const pair of pairs) zoom(pair, factor, (pair.from + pair.to) / 2);
}

function showAll() {
  for (const pair of pairs) {
    for (const view of pair.views) view.shift = 0;
    show(pair, 0, pair.span);
  }
}

function move(pair, share) {
  const by = share * (pair.to - pair.from);
  show(pair, pair.from + by, pair.to + by);
}

/** The events of a layer with some room around them, each side's in its middle. */
function zoomToLayer() {
  if (current.at === null) return;
  const index = report.layers[current.at].index;
  for (const pair of pairs) {
    const ranges = pair.views.map(view => {
      const own = view.line.events.filter(e => e.layer === index);
      return [Math.min(...own.map(e => e.start)), Math.max(...own.map(e => e.start + e.seconds))];
    });
    if (!ranges.every(([from, to]) => from < to)) continue;
    const [before, after] = ranges.map(([from, to]) => (from + to) / 2);
    const span = Math.min(pair.span, 1.3 * Math.max(...ranges.map(([from, to]) => to - from)));
    show(pair, before - span / 2, before + span / 2);
    pair.views[1].shift = span < pair.span ? after - before : 0;
  }
}

// --- mouse and keys ---

function listen(view) {
  const {canvas, pair} = view;
  const timeAt = event => {
    const box = canvas.getBoundingClientRect();
    return shown(view)[0] + (event.clientX - box.left - GUTTER) / (box.width - GUTTER - 2) * (pair.to - pair.from);
  };
  let drag = null;
  canvas.addEventListener("wheel", event => {
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) move(pair, event.deltaX / 800);
    else if (!event.ctrlKey && document.activeElement !== canvas) return;
    else zoom(pair, Math.exp(-event.deltaY / 300), timeAt(event) - view.shift);
    event.preventDefault();
  }, {passive: false});
  canvas.addEventListener("pointerdown", event => {
    drag = {x: event.clientX, from: pair.from, to: pair.to, moved: false};
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => {
    if (drag) {
      const by = (drag.x - event.clientX) / (canvas.clientWidth - GUTTER) * (drag.to - drag.from);
      drag.moved ||= Math.abs(drag.x - event.clientX) > 3;
      if (drag.moved) show(pair, drag.from + by, drag.to + by);
      hideTip();
      return;
    }
    const found = eventAt(view, event, timeAt(event));
    canvas.classList.toggle("over", Boolean(found) && layerAt.has(found.layer));
    if (found) showTip(tipOfEvent(view, found), event.clientX, event.clientY); else hideTip();
  });
  canvas.addEventListener("pointerup", event => {
    const found = drag && !drag.moved ? eventAt(view, event, timeAt(event)) : null;
    drag = null;
    if (found && layerAt.has(found.layer)) select(layerAt.get(found.layer), {open: true});
  });
  canvas.addEventListener("pointercancel", () => { drag = null; });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("keydown", event => {
    const by = {ArrowLeft: -0.2, ArrowRight: 0.2}[event.key];
    if (by) { move(pair, by); event.preventDefault(); }
  });
}

/** The event under the mouse, or one at most three pixels beside it. */
function eventAt(view, mouse, time) {
  const box = view.canvas.getBoundingClientRect(), y = mouse.clientY - box.top;
  if (mouse.clientX - box.left < GUTTER) return null;
  const lane = view.lanes.find(l => y >= l.top && y <= l.top + l.height + 3);
  if (!lane) return null;
  const near = 3 * (view.pair.to - view.pair.from) / (box.width - GUTTER);
  const at = firstAfter(lane.events, time);
  const under = e => e && e.start - near <= time && time <= e.start + e.seconds + near;
  return [lane.events[at], lane.events[at - 1]].find(under) ?? null;
}

function tipOfEvent(view, event) {
  const collective = event.lane === "compute" ? null : view.exchange(event);
  return [
    [placeOf(event), "title"],
    [plain(event.names.join(", ")), "code"],
    collective ? `${bytes(collective.bytes)}, ${seconds(collective.seconds)}, exposed ${seconds(collective.exposed_s)}`
      : seconds(event.seconds),
    collective?.behind.length && [`behind it: ${plain(collective.behind.join("; "))}`, "soft"],
    collective?.needed_by && [`needed by ${plain(collective.needed_by)}`, "soft"],
  ];
}

function drawLegend() {
  const used = new Set(report.phases.flatMap(p => [...p.before.events, ...p.after.events]).map(partOf));
  for (const part of Object.keys(PARTS).filter(p => used.has(p))) {
    $("legend").append(el("span", {}, el("i", {class: `swatch ${part}`}), PARTS[part]));
  }
  $("legend").append(el("span", {}, el("i", {class: "swatch idle"}), "idle: waits for the link"),
                     el("span", {}, el("i", {class: "swatch bound"}), "bound"));
}
