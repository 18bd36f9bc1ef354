// The playground: checks while typing, uploads, the order of references. The server renders it all.
import { swap } from "./live.js";

const TYPING_MS = 400;

export function start(page, { say }) {
  const form = page.querySelector("#order");
  let timer = 0, turn = 0, dragged = null;

  // Sends the form to be looked at, and takes over what came of it: all fields, or notes alone.
  async function check(act, whole, files = []) {
    clearTimeout(timer);
    const mine = ++turn, body = new FormData(form);
    body.append("act", act);
    for (const file of files) body.append("image", file, file.name || "pasted.png");
    const answer = await fetch(form.action, { method: "POST", body, headers: { "x-fragment": "order" } });
    if (answer.status === 401) { location.reload(); return; }
    if (mine !== turn || !answer.headers.get("content-type")?.startsWith("text/html")) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!fresh.getElementById("order")) { say(fresh.querySelector("main p, .card p")?.textContent || "That did not work"); return; }
    const parts = whole ? ["#fields", "#estimate", "#samples"] : ["[data-check][id]"];
    for (const part of page.querySelectorAll(parts.join())) {
      const now = fresh.getElementById(part.id);
      if (now) swap(part, now);
    }
    for (const input of form.querySelectorAll("[aria-describedby]")) {
      const error = document.getElementById(input.getAttribute("aria-describedby").split(" ")[0]);
      if (error?.textContent) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    }
    arrange();
  }

  async function upload(files) {
    const pictures = [...files].filter((file) => file.type.startsWith("image/"));
    if (!pictures.length || !form.querySelector("#references")) return;
    say(`Uploading ${pictures.length}`);
    await check("check", true, pictures);
  }

  function count() {
    for (const note of form.querySelectorAll("[data-count]")) {
      const length = [...document.getElementById(note.dataset.count).value].length;
      note.textContent = note.textContent.replace(/^\d+/, length);
      note.classList.toggle("over", Boolean(note.dataset.max) && length > Number(note.dataset.max));
    }
  }

  function arrange() {
    for (const each of form.querySelectorAll("[data-without-scripts]")) each.hidden = true;
    for (const each of form.querySelectorAll("[data-with-scripts]")) each.hidden = false;
    for (const each of form.querySelectorAll("[data-if-size]")) each.hidden = form.elements.size.value !== each.dataset.ifSize;
    count();
  }

  form.addEventListener("input", (event) => {
    count();
    if (event.target.type === "file") return;
    clearTimeout(timer);
    timer = setTimeout(() => check("check", false), TYPING_MS);
  });
  form.addEventListener("change", (event) => {
    arrange();
    if (event.target.type === "file") {
      const files = [...event.target.files];
      event.target.value = ""; // they are sent as what was pasted is
      upload(files);
    }
    if (event.target.id === "model") check("check", true);
  });
  form.addEventListener("submit", (event) => {
    const act = event.submitter?.value ?? "send";
    if (act === "send") return;
    event.preventDefault();
    delete form.dataset.sent;
    check(act, true);
  }, true);
  form.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) { event.preventDefault(); upload(event.clipboardData.files); }
  });
  page.addEventListener("dragover", (event) => event.preventDefault());
  page.addEventListener("drop", (event) => {
    event.preventDefault();
    const over = event.target.closest(".references li");
    if (dragged && over && over !== dragged) {
      const items = [...over.parentElement.children];
      if (items.indexOf(dragged) < items.indexOf(over)) over.after(dragged); else over.before(dragged);
      check("check", true);
    } else if (event.dataTransfer.files.length) upload(event.dataTransfer.files);
  });
  page.addEventListener("dragstart", (event) => { dragged = event.target.closest(".references li"); });
  page.addEventListener("dragend", () => { dragged = null; });
  arrange();
}
