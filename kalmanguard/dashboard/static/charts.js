// Charts on one time line: uPlot, with bands for the least and greatest value of every stretch of steps.
import { element, number, percent, whole } from "./text.js";

const uPlot = window.uPlot;
const LEFT = 58, RIGHT = 14;

// column: what is drawn; ink: colour; area: another column to fill up to; constant: a level of its own; sparse: known at
// some steps only, so that a line runs through the least values, and a whisker goes up to the greatest.
export const CHARTS = [
  {
    id: "held-out", title: "Held-out loss", unit: "in the unit of the loss", wide: true, height: 250, lost: true, cap: "bound",
    empty: "No probe has been taken yet: the held-out loss is measured now and then only.",
    series: [
      { column: "loss", said: "training loss", ink: "sky", width: 1, faint: true },
      { column: "predicted_low", said: "predicted, 2 deviations", ink: "green", area: "predicted_high" },
      { column: "bound", said: "bound of the envelope", ink: "red", dash: [7, 4], width: 1.6, steps: true, sparse: true },
      { column: "y", said: "held-out loss", ink: "ink", width: 1.8, points: true, sparse: true },
    ],
    needs: ["y", "loss"],
  },
  {
    id: "innovations", title: "Innovations", unit: "standard deviations off the prediction",
    empty: "No innovation yet: the trends are still being learned.", zero: true,
    series: [
      { column: "z_loss", said: "training loss", ink: "blue" },
      { column: "z_gradient", said: "gradient", ink: "orange" },
      { column: "z_gain", said: "update per rate", ink: "green", dash: [6, 3] },
      { column: "z_buffers", said: "buffers", ink: "sky", dash: [2, 3] },
      { column: "z_trajectory", said: "trajectory", ink: "pink", dash: [8, 3, 2, 3] },
      { column: "z_probe", said: "held-out loss", ink: "ink", points: true, sparse: true },
      { constant: "suspicion", said: "suspicion begins", ink: "red", dash: [7, 4] },
    ],
  },
  {
    id: "give-back", title: "Give-back", unit: "share of the progress that is lost", format: percent, floor: 0, cap: 1.5,
    empty: "No progress has been measured yet that could be given back.",
    series: [
      { column: "give_back", said: "given back", ink: "blue", width: 1.6, points: true, sparse: true },
      { constant: "give_back", said: "allowed", ink: "red", dash: [7, 4] },
    ],
  },
  {
    id: "rate", title: "Learning rate", unit: "largest of all groups, as applied", floor: 0,
    empty: "No learning rate was seen.",
    series: [{ column: "learning_rate", said: "learning rate", ink: "blue", width: 1.6 }],
  },
  {
    id: "norms", title: "Gradient and update", unit: "norms, on a logarithmic scale", log: true,
    empty: "Neither gradients nor updates were seen.",
    series: [
      { column: "gradient_norm", said: "gradient", ink: "orange" },
      { column: "update_norm", said: "update (sketched)", ink: "blue", dash: [6, 3] },
    ],
  },
  {
    id: "damping", title: "Damping", unit: "jerk over acceleration of the updates", wide: true, height: 150,
    empty: "The journal holds no sketched updates to tell the damping from.",
    series: [
      { column: "damping", said: "jerk ratio, over some 128 steps", ink: "blue", width: 1.5 },
      { constant: 1.732, said: "updates without memory (1.73)", ink: "quiet", dash: [3, 4] },
    ],
  },
];

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export class Chart {
  constructor(spec, sync, hooks) {
    this.spec = spec;
    this.sync = sync;
    this.hooks = hooks;
    this.legend = element("p", { class: "legend" });
    this.place = element("div", { class: "plot", role: "img", "aria-label": `${spec.title}: ${spec.unit}` });
    this.nothing = element("p", { class: "empty", hidden: true }, spec.empty);
    this.card = element(
      "div", { class: `card chart${spec.wide ? " wide" : ""}`, id: `chart-${spec.id}` },
      element("h3", {}, spec.title, element("span", { class: "quiet" }, spec.unit)), this.legend, this.nothing, this.place,
    );
    this.marks = [];
    new ResizeObserver(() => this.resize()).observe(this.place);
  }

  // Columns as uPlot wants them: steps, then for every drawn line its low and, where it is another, its high.
  show(data, settings, range) {
    this.data = data;
    this.settings = settings;
    this.range = range;
    const drawn = [], values = [data.steps], bands = [];
    for (const line of this.spec.series) {
      if (line.constant !== undefined) {
        const level = typeof line.constant === "number" ? line.constant : settings[line.constant];
        if (level !== null && level !== undefined) drawn.push({ ...line, level });
        continue;
      }
      const column = data.columns[line.column];
      if (!column) continue;
      const low = values.length;
      values.push(this.positive(column.low));
      drawn.push({ ...line, at: low, values: column });
      const top = line.area ? data.columns[line.area] : column.high && { low: column.high };
      if (top) {
        values.push(this.positive(top.high || top.low));
        if (!line.sparse) bands.push({ series: [low + 1, low], fill: ink(line.area ? "band" : "spread") });
        drawn[drawn.length - 1].top = low + 1;
      }
    }
    const wanted = this.spec.needs || this.spec.series.filter((line) => line.column).map((line) => line.column);
    const some = wanted.some((name) => data.columns[name]);
    this.nothing.hidden = some;
    this.place.hidden = this.legend.hidden = !some;
    if (!some) return this.drop();
    const shape = drawn.map((line) => `${line.column || line.constant}${line.top ? "+" : ""}${line.level ?? ""}`).join();
    this.drawn = drawn;
    if (!this.plot || shape !== this.shape) {
      this.shape = shape;
      this.drop();
      this.make(values, bands);
    } else {
      this.plot.setData(values, false);
      this.plot.batch(() => this.scales());
    }
    this.tell(null);
  }

  positive(values) {
    return this.spec.log ? values.map((value) => (value > 0 ? value : null)) : values;
  }

  make(values, bands) {
    const series = [{}];
    for (const line of this.drawn) {
      if (line.at === undefined) continue;
      const base = {
        stroke: line.area ? "transparent" : ink(line.ink), width: line.width || 1.3, dash: line.dash, spanGaps: true,
        alpha: line.faint ? 0.75 : 1, paths: line.steps ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { show: (plot, at, from, to) => Boolean(line.points) && to - from < 90, size: 5, fill: ink(line.ink) },
      };
      series.push({ ...base });
      if (line.top) series.push({ ...base, points: { show: false }, stroke: line.sparse ? "transparent" : base.stroke });
    }
    const axis = { stroke: ink("quiet"), grid: { stroke: ink("grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const format = this.spec.format || ((value) => number(value, 3));
    this.plot = new uPlot(
      {
        width: Math.max(200, this.place.clientWidth || 600), height: this.spec.height || 170,
        padding: [8, RIGHT, 0, 0], legend: { show: false }, series, bands,
        cursor: { sync: { key: this.sync.key, scales: ["x", null] }, drag: { x: true, y: false }, points: { size: 6 }, y: false },
        scales: { x: { time: false, auto: false }, y: { auto: false, distr: this.spec.log ? 3 : 1 } },
        axes: [
          { ...axis, size: 28, label: "step", labelSize: 17, labelGap: 0, labelFont: axis.font, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? whole(tick) : "")) },
          { ...axis, size: LEFT, values: (_, ticks) => ticks.map((tick) => (tick === null || (this.spec.log && Math.log10(tick) % 1) ? "" : format(tick))) },
        ],
        hooks: {
          setCursor: [(plot) => this.tell(plot.cursor.idx)],
          setSelect: [(plot) => this.select(plot)],
          drawClear: [(plot) => this.lines(plot)],
          draw: [(plot) => this.over(plot)],
        },
      },
      values, this.place,
    );
    this.plot.over.addEventListener("mousedown", () => { this.moved = false; });
    this.plot.over.addEventListener("click", (event) => this.pick(event));
    this.plot.over.addEventListener("dblclick", () => this.hooks.zoom(null));
    this.plot.batch(() => this.scales());
  }

  scales() {
    const [low, high] = this.range;
    this.plot.setScale("x", { min: low, max: Math.max(high, low + 1) });
    const [bottom, top] = this.extent();
    this.plot.setScale("y", { min: bottom, max: top });
  }

  // From the least to the greatest value; a blow-up is cut off at the edge instead of flattening the rest.
  extent() {
    const all = [];
    for (const line of this.drawn) {
      if (line.level !== undefined) { all.push(line.level); if (this.spec.zero) all.push(-line.level); continue; }
      if (line.faint) continue;
      for (let at = line.at; at <= (line.top || line.at); at++) for (const value of this.plot.data[at]) if (value !== null) all.push(value);
    }
    if (!all.length) for (const value of this.plot.data[1] || []) if (value !== null) all.push(value);
    if (!all.length) return this.spec.log ? [0.1, 1] : [0, 1];
    all.sort((a, b) => a - b);
    const at = (share) => all[Math.min(all.length - 1, Math.floor(share * all.length))];
    let low = all[0], high = all[all.length - 1];
    if (this.spec.log) return [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high * 1.01))];
    const middle = at(0.98) - at(0.02) || Math.abs(at(0.5)) || Math.abs(high) || 1;
    high = Math.min(high, at(0.98) + 2.5 * middle);
    low = Math.max(low, at(0.02) - 2.5 * middle);
    const bounds = this.spec.cap === "bound" && this.data.columns.bound;
    if (bounds) high = Math.min(high, low + 2 * (Math.max(...bounds.low.filter(Number.isFinite)) - low));
    else if (this.spec.cap) high = Math.min(high, this.spec.cap);
    if (this.spec.floor !== undefined) low = this.spec.floor;
    const room = 0.06 * (high - low || Math.abs(high) || 1);
    return [this.spec.floor !== undefined ? low : low - room, high + room];
  }

  lines(plot) {
    const { ctx, bbox } = plot, ratio = window.devicePixelRatio || 1;
    ctx.save();
    for (const mark of this.marks) {
      if (!mark.deed) continue;
      const x = plot.valToPos(mark.step, "x", true);
      if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
      ctx.strokeStyle = ink(mark.ink);
      ctx.globalAlpha = 0.75;
      ctx.lineWidth = ratio * 1.2;
      ctx.setLineDash(mark.word === "VETO" ? [3 * ratio, 3 * ratio] : []);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  over(plot) {
    const { ctx, bbox } = plot, ratio = window.devicePixelRatio || 1;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const line of this.drawn) {
      if (line.level === undefined) continue;
      for (const level of this.spec.zero ? [line.level, -line.level] : [line.level]) {
        const y = plot.valToPos(level, "y", true);
        ctx.strokeStyle = ink(line.ink);
        ctx.lineWidth = 1.4 * ratio;
        ctx.setLineDash((line.dash || []).map((length) => length * ratio));
        ctx.beginPath();
        ctx.moveTo(bbox.left, y);
        ctx.lineTo(bbox.left + bbox.width, y);
        ctx.stroke();
      }
    }
    for (const line of this.drawn) if (line.at !== undefined && !line.area) this.beyond(plot, line, ratio);
    const lost = this.spec.lost && this.data.columns.lost;
    if (lost) {
      ctx.fillStyle = ink("red");
      ctx.textAlign = "center";
      ctx.font = `bold ${13 * ratio}px sans-serif`;
      const values = lost.high || lost.low;
      values.forEach((value, index) => {
        if (value === 1) ctx.fillText("✕", plot.valToPos(this.data.steps[index], "x", true), bbox.top + 13 * ratio);
      });
    }
    ctx.restore();
  }

  // Whiskers of sparse columns, and a triangle at the edge for what lies beyond it.
  beyond(plot, line, ratio) {
    const { ctx, bbox } = plot, { min, max } = plot.scales.y;
    const lows = plot.data[line.at], highs = plot.data[line.top || line.at];
    ctx.strokeStyle = ctx.fillStyle = ink(line.ink);
    ctx.setLineDash([]);
    ctx.lineWidth = 1.6 * ratio;
    let last = -Infinity;
    for (let index = 0; index < highs.length; index++) {
      const low = lows[index], high = highs[index];
      if (high === null || high === undefined) continue;
      const x = plot.valToPos(this.data.steps[index], "x", true);
      if (line.sparse && !line.steps && high > low) {
        ctx.beginPath();
        ctx.moveTo(x, plot.valToPos(low, "y", true));
        ctx.lineTo(x, plot.valToPos(Math.min(high, max), "y", true));
        ctx.stroke();
        if (high <= max) ctx.fillRect(x - 3 * ratio, plot.valToPos(high, "y", true) - 3 * ratio, 6 * ratio, 6 * ratio);
      }
      if (x - last < 9 * ratio || (high <= max && low >= min)) continue;
      last = x;
      const up = high > max, edge = up ? bbox.top + 1 : bbox.top + bbox.height - 1, away = (up ? 8 : -8) * ratio;
      ctx.beginPath();
      ctx.moveTo(x, edge);
      ctx.lineTo(x - 4.5 * ratio, edge + away);
      ctx.lineTo(x + 4.5 * ratio, edge + away);
      ctx.fill();
    }
  }

  tell(index) {
    const format = this.spec.format || number;
    const parts = this.drawn.map((line) => {
      const style = line.area ? "area" : line.dash ? (line.dash[0] < 4 ? "dot" : "dash") : "";
      const swatch = element("i", { class: style });
      if (line.area) swatch.style.background = ink("band");
      else swatch.style.borderColor = ink(line.ink);
      let value = "";
      if (line.level !== undefined) value = typeof line.constant === "number" ? "" : format(line.level);
      else if (index !== null && index !== undefined) {
        const low = this.plot.data[line.at][index], high = line.top ? this.plot.data[line.top][index] : low;
        if (low !== null && low !== undefined) value = high === low || high === null ? format(low) : `${format(low)} to ${format(high)}`;
      }
      return element("span", {}, swatch, `${line.said}${value ? ` ${value}` : ""}`);
    });
    if (index !== null && index !== undefined && this.data.steps[index] !== undefined) {
      parts.unshift(element("span", {}, element("b", {}, `step ${whole(this.data.steps[index])}`)));
    }
    this.legend.replaceChildren(...parts);
  }

  select(plot) {
    const { left, width } = plot.select;
    if (width < 6) return;
    const low = Math.floor(plot.posToVal(left, "x")), high = Math.ceil(plot.posToVal(left + width, "x"));
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.moved = true;
    this.hooks.zoom([low, high]);
  }

  pick(event) {
    if (this.moved) { this.moved = false; return; }
    const x = event.offsetX;
    let best = null, near = 10;
    for (const mark of this.marks) {
      const distance = Math.abs(this.plot.valToPos(mark.step, "x") - x);
      if (mark.deed && distance < near) { best = mark; near = distance; }
    }
    if (best) this.hooks.open(best.seq);
  }

  resize() {
    const width = this.place.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.spec.height || 170 });
  }

  redraw() {
    if (this.data) { this.drop(); this.show(this.data, this.settings, this.range); }
  }

  drop() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
  }
}
