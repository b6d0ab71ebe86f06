// What lies along the time line besides curves: markers of events, the level of suspicion, findings by layer.
import { element, icon, kind, whole } from "./text.js";

const INK = { ROLLBACK: "purple", VETO: "orange", HALT: "red", ERROR: "red" };
export const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export const marked = (events) =>
  events.map((event) => ({ ...event, deed: Boolean(kind(event.word).deed), ink: INK[event.word] || "orange" }));

export function showMarks(place, marks, [low, high], open) {
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.seq : null;
  const span = Math.max(1, high - low);
  const made = marks.map((mark) => {
    const { said, icon: shape } = kind(mark.word);
    const button = element("button", {
      type: "button", class: `mark ${mark.deed ? "deed" : "small"} w-${mark.word}`, title: `${said}, step ${whole(mark.step)}`,
      "aria-label": `${said}, step ${whole(mark.step)}`,
    }, icon(shape));
    button.dataset.seq = mark.seq;
    button.style.left = `${(100 * (mark.step - low)) / span}%`;
    button.addEventListener("click", () => open(mark.seq));
    return button;
  });
  place.replaceChildren(...made);
  if (focused) made.find((button) => button.dataset.seq === focused)?.focus();
}

const LEVELS = [["warm-up", "line"], ["nominal", "green"], ["suspect", "orange"], ["confirmed", "purple"]];
const RECOVERING = ["recovering", "sky"];

// One row of pixels a stretch: the worst level in it, and whether the supervisor was recovering.
export function showRegime(canvas, legend, data, [low, high]) {
  const ratio = window.devicePixelRatio || 1;
  const width = (canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio)));
  const height = (canvas.height = Math.round(12 * ratio));
  const pen = canvas.getContext("2d");
  const levels = data.columns.level, modes = data.columns.mode;
  const seen = new Set();
  if (levels) {
    const worst = levels.high || levels.low, mode = modes ? modes.high || modes.low : [];
    const span = Math.max(1, high - low);
    const order = data.steps.map((_, index) => index).sort((a, b) => worst[a] - worst[b]);
    for (const index of order) {
      const recovering = mode[index] === 1 && worst[index] < 2;
      const [said, colour] = recovering ? RECOVERING : LEVELS[worst[index]] || LEVELS[0];
      seen.add(said);
      const from = Math.floor((width * (data.steps[index] - low)) / span);
      const next = index + 1 < data.steps.length ? Math.min(data.steps[index + 1], data.steps[index] + 8 * data.width) : data.steps[index] + data.width;
      const to = Math.ceil((width * (next - low)) / span);
      pen.fillStyle = ink(colour);
      // What matters must be seen, however short it was.
      pen.fillRect(from, 0, Math.max(worst[index] >= 2 ? 3 * ratio : 1, to - from), height);
    }
  }
  const shown = [...LEVELS, RECOVERING].filter(([said]) => seen.has(said));
  legend.replaceChildren(element("span", {}, "Level of suspicion:"), ...shown.map(([said, colour]) => {
    const swatch = element("i", { class: "area" });
    swatch.style.background = ink(colour);
    return element("span", {}, swatch, said);
  }));
  canvas.setAttribute("aria-label", `Level of suspicion over time: ${shown.map(([said]) => said).join(", ") || "none yet"}`);
}

export function showLayers(place, found, [low, high]) {
  if (!found.layers.length) {
    place.replaceChildren(element("p", { class: "empty" },
      "No attached sensor has found anything here. Attach one to look into layers: supervisor.attach(Forensics(...))."));
    return;
  }
  const most = Math.max(...found.layers.flatMap((layer) => layer.cells.map(([, count]) => count)));
  const body = element("tbody");
  const canvases = [];
  for (const layer of found.layers) {
    const total = layer.cells.reduce((sum, [, count]) => sum + count, 0);
    const checks = Object.entries(layer.checks).map(([name, count]) => `${name} ${count}`).join(", ");
    const canvas = element("canvas", { role: "img", "aria-label": `${layer.name}: ${total} findings: ${checks}`, title: checks });
    canvases.push([canvas, layer]);
    body.append(element("tr", {}, element("th", { scope: "row", title: layer.name }, layer.name), element("td", {}, canvas), element("td", {}, whole(total))));
  }
  const more = found.left_out ? element("p", { class: "quiet" }, `${found.left_out} layers with fewer findings are left out.`) : "";
  const scale = element("p", { class: "quiet" }, `The darker, the more findings in ${whole(found.width)} ${found.width === 1 ? "step" : "steps"} (at most ${whole(most)}); number of findings on the right.`);
  place.replaceChildren(element("table", {}, body), scale, more);
  for (const [canvas, layer] of canvases) {
    const ratio = window.devicePixelRatio || 1;
    const width = (canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio)));
    const height = (canvas.height = Math.round(16 * ratio));
    const pen = canvas.getContext("2d");
    pen.fillStyle = ink("muted-bg");
    pen.fillRect(0, 0, width, height);
    pen.fillStyle = ink("red");
    for (const [cell, count] of layer.cells) {
      pen.globalAlpha = 0.3 + (0.7 * Math.log1p(count)) / Math.log1p(most);
      const span = Math.max(1, high - low + 1);
      pen.fillRect((width * cell * found.width) / span, 0, Math.max(2, (width * found.width) / span), height);
    }
  }
}
