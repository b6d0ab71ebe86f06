// The page: one run at a time, followed while it is written.
import { follow, get, run } from "./api.js";
import { Chart, CHARTS } from "./charts.js";
import { Panel, row } from "./panel.js";
import { element, icon, kind, number, percent, status, whole } from "./text.js";
import { marked, showLayers, showMarks, showRegime } from "./timeline.js";

const byId = (id) => document.getElementById(id);
const TONES = {
  HEALTHY: ["good", "ok", "Healthy"], "WARMING UP": ["muted", "wait", "Warming up"], SUSPICIOUS: ["warn", "warn", "Suspicious"],
  RECOVERING: ["back", "back", "Recovering"], HARMED: ["bad", "bad", "Harmed"], HALTED: ["bad", "bad", "Halted"],
  UNREADABLE: ["bad", "bad", "Unreadable"], EMPTY: ["muted", "wait", "No step yet"],
};
const ACTIVITY = {
  live: ["live", "good", "rows are being written"], closed: ["ended", "", "the journal is closed"],
  silent: ["silent", "warn", "nothing was written for a minute, and the journal is not closed"], gone: ["gone", "bad", "the run's folder is gone"],
};
const REFRESH_MS = 700;

const page = { id: null, summary: null, events: [], range: null, last: null, stop: () => {}, busy: false, dirty: false, theme: null, certificate: "" };
const panel = new Panel(() => listed().map((event) => ({ ...event, run: page.id })));
const sync = window.uPlot.sync("time");
const hooks = { zoom, open: (seq) => panel.open(page.id, seq) };
const charts = CHARTS.map((spec) => new Chart(spec, sync, hooks));
byId("charts").append(...charts.map((chart) => chart.card));

function listed() {
  return byId("all-events").checked ? page.events : page.events.filter((event) => !["NOTE", "SUSPECT", "FINDING"].includes(event.word));
}

function notice(text) {
  byId("notice").hidden = !text;
  byId("notice").textContent = text || "";
}

async function runs() {
  try {
    const { runs: found } = await get("/runs");
    const select = byId("runs");
    const options = found.map((one) => element("option", { value: one.id }, `${one.name} · ${(TONES[one.word] || [0, 0, one.word])[2]} · step ${whole(one.step)} · ${(ACTIVITY[one.activity] || [one.activity])[0]}`));
    if (options.map((option) => option.text).join("\n") !== [...select.options].map((option) => option.text).join("\n")) {
      select.replaceChildren(...options);
      select.value = page.id || "";
    }
    if (!found.length) nothing("There is no run here yet. A run appears as soon as its journal is begun.");
    else if (!page.id || !found.some((one) => one.id === page.id)) {
      const wanted = location.hash.slice(1);
      const live = found.find((one) => one.activity === "live");
      choose(found.some((one) => one.id === wanted) ? wanted : (live || found[0]).id);
    }
  } catch (error) {
    notice(error.message);
  }
}

function nothing(text) {
  byId("word").textContent = "No run";
  byId("text").textContent = text;
}

function choose(id) {
  page.stop();
  Object.assign(page, { id, summary: null, events: [], range: null, last: null, certificate: "" });
  history.replaceState(null, "", `#${id}`);
  byId("runs").value = id;
  page.stop = follow(id, take, (linked) => {
    byId("link").textContent = linked ? "connected" : "connection lost, trying again";
    byId("link").dataset.tone = linked ? "good" : "warn";
  });
}

function take(summary) {
  if (summary.id !== page.id) return;
  const before = page.summary;
  page.summary = summary;
  verdict(summary);
  figures(summary);
  if (!before || before.revision !== summary.revision) refresh(!before || before.events !== summary.events);
  const stamp = JSON.stringify(summary.certificate);
  if (stamp !== page.certificate) {
    page.certificate = stamp;
    certificate();
  }
}

function verdict(summary) {
  const [tone, shape, said] = TONES[summary.word] || ["muted", "dot", summary.word];
  const [activity, mood, meaning] = ACTIVITY[summary.activity] || [summary.activity, "", ""];
  byId("verdict").dataset.tone = tone;
  byId("badge").setAttribute("href", `#i-${shape}`);
  byId("word").textContent = said;
  byId("text").textContent = summary.text;
  Object.assign(byId("activity"), { textContent: activity, title: meaning, className: `chip ${activity === "live" ? "live" : ""}` });
  byId("activity").dataset.tone = mood;
  document.title = `${said} · ${summary.name} · kalmanguard`;
  const reading = summary.behind > 0 ? `Reading the journal: ${whole(summary.records)} of ${whole(summary.records + summary.behind)} records.` : "";
  notice(summary.word === "UNREADABLE" ? "" : summary.trouble || reading);
  const advice = summary.advice.length ? summary.advice : ["Nothing: let it run."];
  byId("advice").replaceChildren(...advice.map((text) => element("li", {}, text)));
  byId("facts").textContent = `${summary.name}: ${summary.model}; ${whole(summary.records)} records, ${whole(summary.durable)} durable checkpoints.`;
  byId("decision").textContent = summary.last_decision ? `Last decision: ${summary.last_decision}` : "";
}

function figures(summary) {
  const { latest, settings, counts } = summary;
  const bound = latest.bound === null ? "no bound in force yet" : `bound ${number(latest.bound)}, best ${number(latest.y_best)}`;
  const acts = { protect: "acts on what it finds", observe: "only observes" }[settings.mode] || "";
  const items = [
    ["Step", whole(summary.step), acts],
    ["Held-out loss", number(latest.y), bound],
    ["Given back", percent(latest.give_back), settings.give_back === null ? "" : `${percent(settings.give_back)} allowed`],
    ["Training loss", number(latest.loss), ""],
    ["Learning rate", number(latest.learning_rate, 3), ""],
    ["Rollbacks", whole(counts.ROLLBACK || 0), `${whole(counts.VETO || 0)} dropped, ${whole((counts.SUSPECT || 0) + (counts.CONFIRMED || 0))} suspicious`],
  ];
  byId("figures").replaceChildren(...items.map(([name, value, more]) => element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, more)))));
}

// At most one request at a time, and one more when something has changed meanwhile.
async function refresh(events) {
  page.dirty = page.dirty || Boolean(events);
  if (page.busy) { page.again = true; return; }
  page.busy = true;
  const id = page.id;
  try {
    if (page.dirty || !page.events.length) {
      page.dirty = false;
      const found = await get(run(id, "/events"), { limit: 400 });
      if (id !== page.id) return;
      page.events = found.events;
      showEvents(found.total);
    }
    const [low, high] = present();
    const width = Math.round(Math.max(200, Math.min(1000, byId("charts").clientWidth / 2)) / 50) * 50;
    const data = await get(run(id, "/series"), { from: low, to: high, points: width });
    if (id !== page.id) return;
    page.last = data;
    draw();
    if (page.summary.findings || !byId("layers").children.length) page.layers = await get(run(id, "/layers"), { from: low, to: high });
    if (id === page.id) showLayers(byId("layers"), page.layers, present());
  } catch (error) {
    if (id === page.id) notice(error.message);
  } finally {
    setTimeout(() => {
      page.busy = false;
      if (page.again || id !== page.id) { page.again = false; refresh(id !== page.id); }
    }, REFRESH_MS);
  }
}

function present() {
  const { first_step: first, step } = page.summary;
  if (page.range === null) return [first, Math.max(step, first + 1)];
  return typeof page.range === "number" ? [Math.max(first, step - page.range), Math.max(step, first + 1)] : page.range;
}

function draw() {
  const data = page.last, range = present();
  if (!data) return;
  const marks = marked(data.marks);
  for (const chart of charts) {
    chart.marks = marks;
    chart.show(data, page.summary.settings, range);
  }
  showMarks(byId("marks"), marks, range, hooks.open);
  showRegime(byId("regime"), byId("regime-legend"), data, range);
  const stretch = data.width > 1 ? `, ${whole(data.width)} steps a point, least and greatest kept` : "";
  byId("shown").textContent = `steps ${whole(range[0])} to ${whole(range[1])}${stretch}`;
  panel.mark(panel.dialog.open ? panel.seq : null);
}

function zoom(range) {
  page.range = range;
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.setAttribute("aria-pressed", String((range === null && button.dataset.zoom === "all") || (typeof range === "number" && Number(button.dataset.zoom) === range)));
  }
  draw();
  refresh(false);
}

function showEvents(total) {
  const shown = listed();
  const latest = [...shown].reverse();
  byId("events").replaceChildren(...latest.map((event) => row(event, hooks.open)));
  const left = total - page.events.length;
  byId("events-note").textContent = !shown.length
    ? "Nothing was dropped or undone."
    : left > 0 ? `The latest ${whole(page.events.length)} of ${whole(total)} events.` : "";
  const deeds = page.events.filter((event) => kind(event.word).deed);
  const told = (deeds.length ? deeds : page.events).slice(-3).reverse();
  byId("told").replaceChildren(...(told.length
    ? told.map((event) => row(event, hooks.open))
    : [element("li", { class: "empty" }, "Nothing so far: no step was suspicious, dropped or undone.")]));
}

async function certificate(make = false) {
  const id = page.id;
  try {
    const { certificate: known, non_claims: none } = await get(run(id, "/certificate"), make ? { make: 1 } : {});
    if (id !== page.id) return;
    const claims = known.report ? known.report.claims : [];
    const counts = {};
    for (const claim of claims) counts[claim.status] = (counts[claim.status] || 0) + 1;
    byId("certified-counts").replaceChildren(...Object.entries(counts).map(([word, count]) => element("li", { class: "chip" }, status(word), ` ${count}`)));
    byId("certified").textContent = sentence(known, counts);
    byId("claims").replaceChildren(...claims.map((claim) =>
      element("li", {}, status(claim.status), element("div", {}, element("b", {}, claim.name), ` ${claim.title}`), element("small", {}, claim.text))));
    if (!claims.length) byId("claims").append(element("li", { class: "empty" }, known.trouble || "Not checked yet."));
    byId("non-claims").replaceChildren(...none.map((text) => element("li", {}, text)));
    byId("check").disabled = known.pending || !known.stale;
    byId("certificate-age").textContent = known.pending ? "being checked …" : known.report ? (known.stale ? `as of record ${whole(known.records)}; the run has gone on since` : "as of the last record") : "";
  } catch (error) {
    if (id === page.id) byId("certified").textContent = error.message;
  }
}

function sentence(known, counts) {
  if (!known.report) return known.trouble || (known.pending ? "The journal is being verified." : "Not checked yet.");
  if (counts.FAILED) return "The journal contradicts itself: trust nothing that follows from it.";
  const broken = known.report.claims.filter((claim) => claim.status === "LAPSED").map((claim) => claim.name);
  const held = `${counts.HOLDS || 0} claims hold, derived again from the journal alone`;
  return broken.length ? `${held}; ${broken.join(", ")} lapsed.` : `${held}.`;
}

function theme(name) {
  page.theme = name;
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  for (const chart of charts) chart.redraw();
  if (page.last) { draw(); showLayers(byId("layers"), page.layers || { layers: [] }, present()); }
}

function remembered() {
  try { return localStorage.getItem("kalmanguard-theme"); } catch { return null; }
}

function switchTheme() {
  const name = page.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("kalmanguard-theme", name); } catch { /* private windows keep nothing */ }
  theme(name);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input, textarea")) return;
  const help = byId("help-panel");
  if (event.key === "?") help.open ? help.close() : help.showModal();
  else if (event.key === "t") switchTheme();
  else if (event.key === "Escape" && !panel.dialog.open && !help.open) zoom(null);
  else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    if (help.open) return;
    event.preventDefault();
    panel.move(event.key === "ArrowLeft" ? -1 : 1);
  }
});
for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => zoom(button.dataset.zoom === "all" ? null : Number(button.dataset.zoom)));
byId("runs").addEventListener("change", (event) => choose(event.target.value));
byId("all-events").addEventListener("change", () => showEvents(page.summary ? page.summary.events : 0));
byId("theme").addEventListener("click", switchTheme);
byId("help").addEventListener("click", () => byId("help-panel").showModal());
byId("help-close").addEventListener("click", () => byId("help-panel").close());
byId("check").addEventListener("click", () => certificate(true));
window.addEventListener("hashchange", () => { const id = location.hash.slice(1); if (/^[0-9a-f]{16}$/.test(id) && id !== page.id) choose(id); });
let resizing = 0;
window.addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(draw, 150); });
const dark = window.matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => { if (!remembered()) theme(dark.matches ? "dark" : "light"); });
theme(remembered() || (dark.matches ? "dark" : "light"));
runs();
setInterval(runs, 4000);
