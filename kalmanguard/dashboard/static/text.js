// Numbers and elements. Whatever comes from a journal is put in as text, never as markup.

export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e9) return value.toExponential(digits - 2).replace("e+", "e");
  if (size >= 1e5) return Math.round(value).toLocaleString("en");
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 10 });
}

export const whole = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
export const percent = (value) => (value === null || value === undefined ? "–" : `${number(100 * value, 3)} %`);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const made = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  made.setAttribute("aria-hidden", "true");
  made.append(use);
  return made;
}

// What an event is called, and its shape: a colour alone says nothing to many people.
export const EVENTS = {
  ROLLBACK: { said: "Rolled back", icon: "back", deed: true },
  VETO: { said: "Update dropped", icon: "drop", deed: true },
  HALT: { said: "Halted", icon: "bad", deed: true },
  CONFIRMED: { said: "Harm confirmed", icon: "warn" },
  SUSPECT: { said: "Suspicious", icon: "warn" },
  FINDING: { said: "Sensor finding", icon: "dot" },
  ERROR: { said: "Fault of the supervisor", icon: "bad" },
  NOTE: { said: "Note", icon: "dot" },
};
export const kind = (word) => EVENTS[word] || { said: word, icon: "dot" };

export const STATUS = {
  HOLDS: ["good", "ok", "derived again from the journal"],
  "NOT CLAIMED": ["muted", "dot", "nothing to check, or nothing promised"],
  VACUOUS: ["muted", "dot", "true, but too weak to be of use"],
  LAPSED: ["warn", "warn", "held once, or broken openly"],
  INCOMPLETE: ["warn", "wait", "the journal is not closed"],
  FAILED: ["bad", "bad", "the journal contradicts itself"],
};

export function status(word) {
  const [tone, shape, meaning] = STATUS[word] || ["muted", "dot", ""];
  return element("span", { class: "status", "data-tone": tone, title: meaning }, icon(shape), word);
}
