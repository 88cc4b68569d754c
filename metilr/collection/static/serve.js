// Sends a photo that was dropped, chosen or taken, and shows the answer. All text goes in as text, never as HTML.
"use strict";

const form = document.getElementById("ask");
const place = document.getElementById("answer");
const maxBytes = Number(form.dataset.maxBytes);
let asking = null; // what stops the request under way
let preview = null; // address of the picture shown

for (const input of form.querySelectorAll("input[type=file]")) {
  input.addEventListener("change", () => {
    if (input.files.length) ask(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  });
}
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    form.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) form.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault(); // anywhere on the page, or the browser would open the file instead
  form.classList.remove("over");
  if (event.dataTransfer.files.length) ask(event.dataTransfer.files[0]);
});

async function ask(file) {
  if (asking) asking.abort();
  const mine = (asking = new AbortController());
  if (preview) URL.revokeObjectURL(preview);
  preview = URL.createObjectURL(file);
  show("waiting", file, "Looking …", []);
  if (file.size > maxBytes) {
    show("error", file, `The photo has ${(file.size / 1e6).toFixed(1)} MB; at most ${maxBytes / 1e6} are taken.`, []);
    return;
  }
  const body = new FormData();
  body.append("photo", file);
  try {
    const response = await fetch("/identify", { method: "POST", body, signal: mine.signal });
    const answer = await response.json();
    if (response.ok) showAnswer(file, answer);
    else show("error", file, answer.error, []);
  } catch (error) {
    if (error.name !== "AbortError") show("error", file, "The server does not answer; is it still running?", []);
  }
}

function showAnswer(file, answer) {
  const parts = [element("p", "", answer.detail)];
  if (answer.about && answer.decision !== "not in the collection") parts.push(label(answer));
  if (answer.reduced) parts.push(element("p", "soft", "the photo was reduced to the collection's size"));
  const matches = element("ol", "matches");
  for (const match of answer.matches) {
    const item = element("li", "");
    item.append(
      match.picture ? picture(match.picture, `database image of ${match.named}`) : element("span", "none", "no picture"),
      element("span", "name", match.named),
      element("span", "soft", `similarity ${match.similarity.toFixed(3)}` + ("inliers" in match ? `, ${match.inliers} inliers` : "")),
    );
    matches.append(item);
  }
  const regions = [];
  if (answer.regions) {
    const figure = element("figure", "regions");
    figure.append(picture(answer.regions, "matching regions"), element("figcaption", "soft", "what the photo and the exhibit's image have in common"));
    regions.push(figure);
  }
  show(answer.decision.replaceAll(" ", "-"), file, answer.headline, [...parts, matches, ...regions]);
}

// What is said of an exhibit, as on the label beside it; its title is the headline.
function label(answer) {
  const about = answer.about;
  const place = element("div", "label soft");
  const lines = Object.entries(about.more || {}).slice(0, 8).map(([name, value]) => `${name}: ${value}`);
  for (const line of [`exhibit ${answer.exhibit}`, ...lines, about.rights]) if (line) place.append(element("p", "", line));
  if (about.link) {
    const link = element("a", "", about.link);
    link.href = about.link; // the server lets https and http through alone
    link.rel = "noopener noreferrer";
    place.append(link);
  }
  return place;
}

function show(kind, file, headline, parts) {
  const photo = element("figure", "photo");
  const image = picture(preview, "your photo");
  image.addEventListener("error", () => image.replaceWith(element("span", "none", "no picture")));
  photo.append(image, element("figcaption", "", file.name));
  const said = element("div", "said");
  said.append(element("h2", "", headline), ...parts);
  const article = element("article", `answer ${kind}`);
  article.append(photo, said);
  place.replaceChildren(article);
}

function picture(address, description) {
  const image = document.createElement("img");
  image.src = address;
  image.alt = description;
  return image;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
