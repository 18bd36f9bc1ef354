// The console works without scripts. These add live parts, copying and dialogs.
import { refresh, watch } from "./live.js";

function showCopyButtons(root) {
  if (!navigator.clipboard) return; // plain http on another host than this one
  for (const button of root.querySelectorAll("[data-copy]")) button.hidden = false;
}

async function copy(button) {
  const source = button.dataset.copyFrom && document.getElementById(button.dataset.copyFrom);
  await navigator.clipboard.writeText(source ? source.textContent : button.dataset.copy);
  say("Copied");
}

// Tells screen readers, and shows for a moment, that something was done.
export function say(text) {
  let note = document.getElementById("said");
  if (!note) {
    note = document.createElement("p");
    note.id = "said";
    note.className = "said";
    note.setAttribute("role", "status");
    document.body.append(note);
  }
  note.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { note.textContent = ""; }, 2000);
}

// Opens the page of a link as a dialog. If that fails, the browser follows the link.
async function openDialog(link) {
  const answer = await fetch(link.href, { headers: { "x-fragment": "dialog" } });
  if (!answer.ok || answer.redirected) { location.href = link.href; return; }
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const dialog = document.createElement("dialog");
  const heading = page.querySelector("h2");
  if (heading) { heading.id = "dialog-title"; dialog.setAttribute("aria-labelledby", heading.id); }
  dialog.append(...page.body.children);
  document.body.append(dialog);
  dialog.addEventListener("close", () => { dialog.remove(); link.focus(); });
  dialog.showModal();
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-copy], [data-dialog], [data-close]");
  if (!target || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const dialog = target.closest("dialog");
  if (target.matches("[data-copy]")) copy(target);
  else if (target.matches("[data-dialog]")) { event.preventDefault(); openDialog(target); }
  else if (dialog) { event.preventDefault(); dialog.close(); }
});

// A form that is on its way is not sent twice. A page that comes back from the cache can send again.
document.addEventListener("submit", (event) => {
  if (event.defaultPrevented || event.target.method === "get") return;
  if (event.target.dataset.sent) { event.preventDefault(); return; }
  event.target.dataset.sent = "yes";
  event.submitter?.setAttribute("aria-busy", "true");
});
addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("[data-sent]")) {
    delete form.dataset.sent;
    for (const busy of form.querySelectorAll("[aria-busy]")) busy.removeAttribute("aria-busy");
  }
});
document.addEventListener("swapped", (event) => showCopyButtons(event.target));

showCopyButtons(document);
watch();
const module = document.querySelector("[data-module]");
if (module) (await import(`./${module.dataset.module}.js`)).start(module, { refresh, say });
