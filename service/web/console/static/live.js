// Live parts of a page. An event of the service is a hint: the part is fetched again 250 ms later.
//   <section id="list" data-live="image.task.*">  fetched again when such an event comes
//   <section id="work" data-poll="2">             fetched again every 2 s, while it says so
//   data-src="/console/…"                         the page that has the part, by default this one
const DEBOUNCE_MS = 250;
const timers = new Map();
let stream = null;

const parts = () => [...document.querySelectorAll("[data-live][id], [data-poll][id]")];

// Takes over what the new part has, unless nothing changed. Focus and opened details stay.
export function swap(old, fresh) {
  if (old.outerHTML === fresh.outerHTML) return;
  const focused = old.contains(document.activeElement) && document.activeElement.id;
  const opened = [...old.querySelectorAll("details[open][id]")].map((each) => each.id);
  old.replaceWith(fresh);
  for (const id of opened) document.getElementById(id)?.setAttribute("open", "");
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  fresh.dispatchEvent(new Event("swapped", { bubbles: true }));
}

export async function refresh(id) {
  const part = document.getElementById(id);
  if (!part || document.hidden) return;
  try {
    const source = part.dataset.src || location.href;
    const answer = await fetch(source, { headers: { "x-fragment": id } });
    if (answer.status === 401) location.reload(); // the session has ended
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.getElementById(id);
    const now = document.getElementById(id);
    if (fresh && now) swap(now, fresh);
  } catch { /* the service is away: the next hint or poll asks again */ } finally { poll(id); }
}

function later(id, ms) {
  const key = `${id} ${ms}`;
  if (timers.has(key)) return; // one look serves all hints that come before it
  timers.set(key, setTimeout(() => { timers.delete(key); refresh(id); }, ms));
}

function poll(id) {
  const seconds = Number(document.getElementById(id)?.dataset.poll);
  if (seconds > 0 && !document.hidden) later(id, seconds * 1000);
}

function matches(type, patterns) {
  return patterns.split(/[ ,]+/).some((each) => each === type || (each.endsWith("*") && type.startsWith(each.slice(0, -1))));
}

function hint(event) {
  for (const part of parts()) {
    if (part.dataset.live && matches(event.type, part.dataset.live)) later(part.id, DEBOUNCE_MS);
  }
}

const TYPES = ["image.task.submitted", "image.task.completed", "image.task.failed", "image.task.cancelled",
  "image.task.expired", "callback.conflict", "task.late_result", "task.parked", "image.at_risk",
  "endpoint.disabled", "endpoint.recovered", "delivery.exhausted", "submission.paused", "submission.resumed"];

function listen() {
  if (stream || !document.querySelector("[data-live]")) return;
  stream = new EventSource("/v1/events");
  for (const type of TYPES) stream.addEventListener(type, hint);
  stream.onopen = () => { if (stream.reopened) parts().forEach((part) => refresh(part.id)); stream.reopened = true; };
}

function pause() {
  stream?.close();
  stream = null;
  for (const timer of timers.values()) clearTimeout(timer);
  timers.clear();
}

export function watch() {
  listen();
  for (const part of parts()) poll(part.id);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { pause(); return; }
    listen();
    for (const part of parts()) refresh(part.id);
  });
  addEventListener("pagehide", pause);
}
