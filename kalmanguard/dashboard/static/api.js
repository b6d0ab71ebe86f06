// The server's interface: JSON by GET, and one stream of summaries.

const ROOT = "/api/v1";

export async function get(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams(parameters).toString();
  const answer = await fetch(`${ROOT}${path}${query ? `?${query}` : ""}`, { signal, credentials: "same-origin" });
  let data = {};
  try {
    data = await answer.json();
  } catch {
    data = { error: `The server answered ${answer.status}, and no JSON.` };
  }
  if (!answer.ok) throw new Error(data.error || `The server answered ${answer.status}.`);
  return data;
}

export const run = (id, rest = "") => `/runs/${encodeURIComponent(id)}${rest}`;

export function follow(id, take, linked) {
  const source = new EventSource(`${ROOT}${run(id, "/stream")}`);
  source.addEventListener("summary", (message) => take(JSON.parse(message.data)));
  source.onopen = () => linked(true);
  source.onerror = () => linked(false);
  return () => source.close();
}
