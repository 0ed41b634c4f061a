// The report as it was written by html.py, unpacked; words for figures; how elements are made.

const report = JSON.parse(document.getElementById("report").textContent);

function rows(table) {
  const columns = Object.entries(table).map(([name, values]) => {
    if (name[0] !== "$") return [name, values];
    const text = v => v === null ? null : Array.isArray(v) ? v.map(i => report.strings[i]) : report.strings[v];
    return [name.slice(1), values.map(text)];
  });
  const count = columns.length ? columns[0][1].length : 0;
  return Array.from({length: count}, (_, i) => Object.fromEntries(columns.map(([name, values]) => [name, values[i]])));
}

for (const name of ["layers", "reads", "blocks", "changes", "collectives"]) report[name] = rows(report[name]);
for (const phase of report.phases) {
  for (const side of ["before", "after"]) {
    phase[side].events = rows(phase[side].events);
    phase[side].collectives = rows(phase[side].collectives);
  }
}
for (const layer of report.layers) {
  for (const name of ["reads", "blocks", "changes"]) layer[name] = report[name].filter(row => row.layer === layer.index);
}
const layerAt = new Map(report.layers.map((layer, at) => [layer.index, at]));

// --- names: what could hide, reorder or restyle text is shown as its code ---

const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

function plain(text, most = 300) {
  const shown = String(text).replace(HIDDEN, c => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  return shown.length <= most ? shown : shown.slice(0, most - 1) + "…";
}

// --- figures: as many digits as the report was written with ---

const TIMES = [["s", 1], ["ms", 1e-3], ["µs", 1e-6], ["ns", 1e-9]];
const SIZES = [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]];

function digits(value) {
  const text = value.toPrecision(4);
  return text.includes("e") ? String(Number(text)) : text;
}

function scaled(value, units, like) {
  const [unit, size] = units.find(([, size]) => like >= size) ?? units[units.length - 1];
  return `${digits(value / size)} ${unit}`;
}

/** `like`: a figure beside it, whose unit it takes. */
function seconds(s, like = s) {
  if (s === null || s === undefined) return "–";
  return s < 5e-10 ? "0 s" : scaled(s, TIMES, like);
}

function bytes(n) {
  if (n === null || n === undefined) return "–";
  return n < 1000 ? `${n} B` : scaled(n, SIZES, n);
}

// --- elements: text is always text ---

function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.flat().filter(child => child || child === 0));
  return element;
}

function $(id) {
  return document.getElementById(id);
}

// --- what a part is called, in the stream, the timelines and the legend ---

const PARTS = {attention: "attention", routed: "routed experts", shared: "router, shared expert", mlp: "dense MLP",
               none: "no block", counts: "counts", dispatch: "dispatch", combine: "combine"};

function partOf(event) {
  if (["counts", "dispatch", "combine", "routed", "shared"].includes(event.part)) return event.part;
  if (event.block === "attention" || event.block === "mlp") return event.block;
  return event.block ? "shared" : "none";
}

function placeOf(event) {
  if (event.layer === null || event.layer === undefined) return "outside the layers";
  return `layer ${event.layer}, ${plain(event.block)}${event.part && event.part !== "all" ? `, ${plain(event.part)}` : ""}`;
}

// --- the tooltip ---

const tip = $("tip");

/** `lines`: [text, class] or text. */
function showTip(lines, x, y) {
  tip.replaceChildren(...lines.filter(Boolean).map(line => {
    const [text, kind] = Array.isArray(line) ? line : [line, ""];
    return el("div", kind ? {class: kind} : {}, text);
  }));
  tip.hidden = false;
  const {width, height} = tip.getBoundingClientRect();
  const left = Math.min(x + 14, innerWidth - width - 8);
  const top = y + 16 + height > innerHeight ? y - height - 12 : y + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}

function hideTip() {
  tip.hidden = true;
}
