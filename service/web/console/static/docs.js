// Opens the part of the page that a link leads to.
function open() {
  const part = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let each = part; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
  part?.scrollIntoView();
}
addEventListener("hashchange", open);
open();
