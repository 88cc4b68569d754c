"use strict";
// Shows the findings of one kind, and those whose paths or exhibits hold a text.
const kind = document.getElementById("kind"), text = document.getElementById("text"), count = document.getElementById("count");
function show() {
  const wanted = text.value.trim().toLowerCase();
  let n = 0;
  for (const section of document.querySelectorAll("section.kind")) {
    let here = 0;
    for (const card of section.querySelectorAll("li.card")) {
      card.hidden = wanted !== "" && !card.textContent.toLowerCase().includes(wanted);
      here += card.hidden ? 0 : 1;
    }
    section.hidden = (kind.value !== "" && kind.value !== section.dataset.kind) || here === 0;
    n += section.hidden ? 0 : here;
  }
  count.textContent = `${n.toLocaleString("en")} shown`;
}
if (kind) {
  kind.addEventListener("change", show);
  text.addEventListener("input", show);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  show();
}
