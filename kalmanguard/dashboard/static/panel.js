// Events as a list, and one of them looked at closely.
import { get, run } from "./api.js";
import { element, icon, kind, number, whole } from "./text.js";

export function row(event, open) {
  const { said, icon: shape } = kind(event.word);
  const shown = icon(shape);
  shown.classList.add(`w-${event.word}`);
  const button = element("button", { type: "button", class: "event" }, shown,
    element("b", {}, said, " ", element("span", {}, `step ${whole(event.step)}`)), element("em", {}, event.text));
  button.dataset.seq = event.seq;
  button.addEventListener("click", () => open(event.seq));
  return element("li", {}, button);
}

const part = (title, ...children) => (children.length ? [element("h3", {}, title), ...children] : []);

function proof(item) {
  const facts = [
    Number.isFinite(item.statistic) ? `statistic ${number(item.statistic)}` : null,
    Number.isFinite(item.p_value) ? `p ${number(item.p_value, 3)}` : null,
    Number.isFinite(item.e_value) ? `e ${number(item.e_value, 3)}` : null,
    `guarantee: ${item.guarantee.toLowerCase()}`,
  ].filter(Boolean);
  const made = element("div", { class: "proof" },
    element("p", {}, element("b", {}, item.detector), item.fired ? " fired" : " did not fire"),
    element("p", {}, item.message), element("small", {}, facts.join(" · ")));
  made.dataset.fired = item.fired;
  return made;
}

function outcome(found) {
  if (found.error) return element("p", {}, `The restore failed: ${found.error}`);
  const exact = found.exact
    ? `bit for bit: its digest is the one that was recorded when it was captured (${found.digest.slice(0, 16)}…)`
    : "but it was not shown to be the captured one bit for bit";
  return element("p", {}, `The state of step ${whole(found.restored_step)} was restored, ${exact}.`);
}

function describe(found) {
  const told = [element("p", { class: "lead" }, found.text || "No sentence was recorded.")];
  if (found.outcome) told.push(...part("What was done", outcome(found.outcome)));
  if (found.action === "ACCEPT" && found.proposed !== "ACCEPT") {
    told.push(...part("What was done", element("p", {}, `Nothing: ${found.proposed} was proposed, and the supervisor only observes.`)));
  }
  const proofs = [...(found.evidence || [])].sort((a, b) => b.fired - a.fired);
  if (found.kind === "step") told.push(...part("Evidence", ...(proofs.length ? proofs.map(proof) : [element("p", { class: "empty" }, "No detector had a word on this step.")])));
  told.push(...part("Findings of sensors", ...(found.findings || []).map(proof)));
  if (found.advice && found.advice.length) told.push(...part("What to do", element("ul", { class: "advice" }, ...found.advice.map((text) => element("li", {}, text)))));
  const measured = Object.entries(found.measured || found.facts || {});
  if (measured.length) {
    told.push(...part(found.measured ? "Measured" : "Recorded", element("dl", { class: "keys" },
      ...measured.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value === null ? "not finite" : typeof value === "number" ? number(value, 5) : String(value))]))));
  }
  const state = found.level ? ` · level ${found.level.toLowerCase()} · ${found.mode.toLowerCase()}` : "";
  told.push(element("p", { class: "quiet" }, `Record ${whole(found.seq)} of the journal${state}`));
  return told;
}

export class Panel {
  constructor(find) {
    this.find = find;
    this.dialog = document.getElementById("panel");
    this.title = document.getElementById("panel-title");
    this.body = document.getElementById("panel-body");
    this.steps = { earlier: document.getElementById("earlier"), later: document.getElementById("later") };
    this.steps.earlier.addEventListener("click", () => this.move(-1));
    this.steps.later.addEventListener("click", () => this.move(1));
    document.getElementById("close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.dialog.addEventListener("close", () => this.mark(null));
    this.seq = null;
  }

  async open(id, seq) {
    this.id = id;
    this.seq = seq;
    if (!this.dialog.open) this.dialog.showModal();
    this.mark(seq);
    this.turn();
    this.title.textContent = "Event";
    this.body.replaceChildren(element("p", { class: "empty" }, "Reading the journal …"));
    try {
      const found = await get(run(id, `/events/${seq}`));
      if (this.seq !== seq) return;
      this.title.textContent = `${kind(found.word).said}, step ${whole(found.step)}`;
      this.body.replaceChildren(...describe(found));
    } catch (error) {
      if (this.seq === seq) this.body.replaceChildren(element("p", { class: "empty" }, error.message));
    }
    this.dialog.scrollTop = 0;
  }

  // The neighbour of what is open; when nothing is, what was open last, or else the latest event.
  move(by) {
    const events = this.find();
    const at = events.findIndex((event) => event.seq === this.seq);
    const next = at >= 0 && !this.dialog.open ? events[at] : at < 0 ? events[by < 0 ? events.length - 1 : 0] : events[at + by];
    if (next) this.open(next.run, next.seq);
  }

  turn() {
    const events = this.find();
    const at = events.findIndex((event) => event.seq === this.seq);
    this.steps.earlier.disabled = at === 0;
    this.steps.later.disabled = at === events.length - 1;
  }

  mark(seq) {
    for (const other of document.querySelectorAll("[data-seq]")) {
      if (Number(other.dataset.seq) === seq) other.setAttribute("aria-current", "true");
      else other.removeAttribute("aria-current");
    }
  }
}
