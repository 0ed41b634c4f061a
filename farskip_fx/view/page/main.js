// Which layer is selected, and what the keys do.

const current = {at: null, open: false};

/** Layer number `at` of the list. `open`: also show its details. */
function select(at, {open = current.open} = {}) {
  if (at === null || !report.layers.length) return;
  if (current.at !== null) unmark(current.at);
  current.at = Math.min(Math.max(at, 0), report.layers.length - 1);
  const row = rowsOfStream[current.at];
  row.classList.add("selected");
  row.setAttribute("aria-selected", "true");
  $("stream").setAttribute("aria-activedescendant", row.id);
  $("zoom-layer").disabled = !pairs.length;
  intoView(track.layers[current.at]);
  current.open = open;
  drawDetails();
  redraw();
}

function unmark(at) {
  rowsOfStream[at].classList.remove("selected");
  rowsOfStream[at].setAttribute("aria-selected", "false");
}

function close() {
  if (current.open) {
    current.open = false;
  } else if (current.at !== null) {
    unmark(current.at);
    current.at = null;
    $("zoom-layer").disabled = true;
    $("stream").removeAttribute("aria-activedescendant");
  }
  drawDetails();
  redraw();
}

function drawDetails() {
  const panel = $("details");
  panel.hidden = !current.open;
  $("guide").hidden = current.open;
  if (!current.open) { panel.replaceChildren(); return; }
  panel.replaceChildren(...details(current.at));
  panel.querySelector(".close").addEventListener("click", () => { close(); $("stream").focus(); });
  $("side").scrollTop = 0;
}

/** Scroll the stream, and only it. */
function intoView({top, bottom}) {
  const frame = $("stream"), zoom = frame.firstElementChild.clientWidth / WIDTH, room = 60;
  let to = frame.scrollTop;
  if (top * zoom - room < to) to = top * zoom - room;
  if (bottom * zoom + room > to + frame.clientHeight) to = bottom * zoom + room - frame.clientHeight;
  frame.scrollTop = to;
}

const KEYS = {
  j: () => select(current.at === null ? 0 : current.at + 1), ArrowDown: () => KEYS.j(),
  k: () => select(current.at === null ? report.layers.length - 1 : current.at - 1), ArrowUp: () => KEYS.k(),
  Home: () => select(0), End: () => select(report.layers.length - 1),
  PageDown: () => select((current.at ?? 0) + 10), PageUp: () => select((current.at ?? 0) - 10),
  Enter: () => select(current.at ?? 0, {open: true}), Escape: close,
  "+": () => zoomAll(1.6), "=": () => zoomAll(1.6), "-": () => zoomAll(1 / 1.6), 0: showAll, z: zoomToLayer,
};
// These scroll the page or press a button, unless the stream has the focus.
const ONLY_IN_STREAM = new Set(["ArrowDown", "ArrowUp", "Home", "End", "PageDown", "PageUp", "Enter"]);

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  const inStream = document.activeElement === $("stream") || document.activeElement === document.body;
  if (ONLY_IN_STREAM.has(event.key) && !inStream) return;
  KEYS[event.key]();
  event.preventDefault();
});

$("zoom-in").addEventListener("click", () => zoomAll(1.6));
$("zoom-out").addEventListener("click", () => zoomAll(1 / 1.6));
$("zoom-all").addEventListener("click", showAll);
$("zoom-layer").addEventListener("click", zoomToLayer);

readColours();
drawHeader();
drawStream();
drawGuide();
drawTimelines();
drawMore();
