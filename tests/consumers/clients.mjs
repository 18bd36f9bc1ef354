// The journeys of clients from the npm registry, each as it comes: eventsource reads a stream while
// openai makes images. Prints one JSON line for each thing that the clients report.
import { EventSource } from "eventsource";
import OpenAI from "openai";

const { SERVICE, KEY, AFTER, MODEL } = process.env;
const say = (kind, value) => console.log(JSON.stringify([kind, value]));
const seen = ({ lastEventId, type, data }) => say("event", [lastEventId, type, JSON.parse(data)]);

const authorized = (url, init) =>
  fetch(url, { ...init, headers: { ...init.headers, Authorization: `Bearer ${KEY}` } });
const source = new EventSource(`${SERVICE}/v1/events?after=${AFTER}`, { fetch: authorized });
source.onmessage = (event) => say("nameless", [event.lastEventId, event.data]);
source.onerror = (event) => say("error", event.message);
let ended = 0;
const done = new Promise((resolve) => {
  for (const state of ["submitted", "completed"]) {
    source.addEventListener(`image.task.${state}`, (event) => {
      seen(event);
      if (state === "completed" && ++ended === 2) resolve();
    });
  }
});
await new Promise((resolve) => (source.onopen = resolve));

const defaultHeaders = { Prefer: "wait=30" };
const client = new OpenAI({ baseURL: `${SERVICE}/v1`, apiKey: KEY, defaultHeaders });
const order = { model: MODEL, prompt: "a lighthouse", size: "768x768" };
for (const n of [1, 2]) {
  const made = await client.images.generate({ ...order, n });
  say("images", [made.id, made.created, made.data.map((image) => image.url)]);
}
try {
  await client.images.generate({ ...order, size: "9x9" });
} catch (error) {
  say("refusal", [error instanceof OpenAI.BadRequestError, error.status, error.param, error.type]);
}
await done;
source.close();
