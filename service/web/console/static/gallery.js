// Keys of the gallery: arrows move, the space bar selects. In the large view arrows lead on.
export function start(element) {
  addEventListener("keydown", (event) => {
    if (event.target.matches("input:not([type=checkbox]), select, textarea") || event.altKey || event.ctrlKey || event.metaKey) return;
    const large = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    const link = large && document.querySelector(`a[rel="${large}"]`);
    if (element.matches(".picture")) { if (link) location.href = link.href; return; }
    const pictures = [...element.querySelectorAll("[data-picture]")];
    const place = pictures.indexOf(document.activeElement);
    const top = (picture) => picture.getBoundingClientRect().top;
    const across = pictures.filter((each) => Math.abs(top(each) - top(pictures[0])) < 2).length || 1;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
    if (step) {
      event.preventDefault();
      pictures[place < 0 ? 0 : Math.min(pictures.length - 1, Math.max(0, place + step))]?.focus();
    } else if (event.key === " " && place >= 0) {
      event.preventDefault();
      pictures[place].parentElement.querySelector("input").click();
    }
  });
  const button = document.getElementById("download");
  const count = () => {
    const chosen = element.querySelectorAll("input:checked").length;
    button.disabled = !chosen;
    button.textContent = chosen ? `Download ${chosen} as zip` : "Download selection (zip)";
  };
  if (button) {
    element.addEventListener("change", count);
    element.addEventListener("submit", () => setTimeout(() => { delete element.dataset.sent; button.removeAttribute("aria-busy"); }, 1000));
    addEventListener("pageshow", count);
    count();
  }
}
