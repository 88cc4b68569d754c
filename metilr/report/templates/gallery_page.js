"use strict";
// The gallery of the report: filters, search and pages over window.GALLERY, which gallery.js defines.
(() => {
  const PER_PAGE = 24;
  const data = window.GALLERY;
  const pictures = new Set(data.pictures);
  const controls = document.getElementById("controls");
  const cards = document.getElementById("cards");
  const previous = document.getElementById("previous");
  const next = document.getElementById("next");
  let page = 0;

  // A query as page.py writes it.
  const query = ([row, path, kind, label, answer, outcome, logConfidence, margin, matches, similarities, inliers]) =>
    ({ row, path, kind, label, answer, outcome: data.outcomes[outcome], logConfidence, margin, matches, similarities,
      inliers });
  const splits = Object.fromEntries(Object.entries(data.splits).map(([split, rows]) => [split, rows.map(query)]));
  const exhibit = (label) => String(data.exhibits[label]);

  function wanted(split, show, text) {
    const low = data.low_margin[split];
    return splits[split].filter((q) => {
      if (show === "low margin" ? !(q.label !== null && q.margin !== null && q.margin <= low)
        : show === "distractor" ? q.label !== null
        : show !== "all" && q.outcome !== show) return false;
      if (!text) return true;
      if (/^\d+$/.test(text)) return [q.label, q.answer].some((l) => l !== null && exhibit(l) === text);
      return q.path.toLowerCase().includes(text);
    });
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function picture(name, path, caption, isTrue) {
    const figure = element("figure", isTrue ? "picture true" : "picture");
    if (pictures.has(name)) {
      const image = element("img");
      image.src = `pictures/${name}.jpg`;
      image.loading = "lazy";
      image.alt = path;
      figure.append(image);
    } else {
      figure.append(element("span", "none", "no picture"));
    }
    figure.title = path;
    figure.append(element("figcaption", "", caption));
    return figure;
  }

  function headline(q) {
    const answer = q.answer === null ? "no answer" : exhibit(q.answer);
    if (q.outcome === "wrong") return `${answer}, but shows ${exhibit(q.label)}`;
    if (q.outcome === "right") return `${answer}, right`;
    return q.outcome === "false alarm" ? `false alarm: ${answer}` : `passed over (nearest ${answer})`;
  }

  function card(split, q) {
    const item = element("li", `card ${q.outcome.replaceAll(" ", "-")}`);
    const left = element("div", "query");
    left.append(picture(`${split}${q.row}`, q.path, q.path));
    const right = element("div", "answer");
    right.append(element("h3", "", headline(q)));
    const sure = q.logConfidence === null ? "skipped" : `log-confidence ${Number(q.logConfidence.toPrecision(3))}`;
    const margin = q.margin === null ? "" : `, margin ${q.margin.toFixed(3)}`;
    right.append(element("p", "", `${q.kind}, ${sure}${margin}`));
    const strip = element("div", "matches");
    q.matches.forEach((row, i) => {
      const [path, label] = data.database[row];
      const inliers = q.inliers.length > i ? `, ${q.inliers[i]} inliers` : "";
      strip.append(picture(`d${row}`, path, `${exhibit(label)} ${q.similarities[i].toFixed(3)}${inliers}`, label === q.label));
    });
    if (q.outcome === "wrong" && !q.matches.some((row) => data.database[row][1] === q.label)) {
      const row = Object.keys(data.database).find((r) => data.database[r][1] === q.label);
      strip.append(picture(`d${row}`, data.database[row][0], `${exhibit(q.label)}, shown`, true));
    }
    right.append(strip);
    if (pictures.has(`m${split}${q.row}`)) {
      const regions = picture(`m${split}${q.row}`, "matching regions", "what the query and its answer have in common", false);
      regions.className = "regions";
      right.append(regions);
    }
    item.append(left, right);
    return item;
  }

  function show() {
    const split = controls.elements.split.value;
    const found = wanted(split, controls.elements.show.value, controls.elements.search.value.trim().toLowerCase());
    const last = Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    cards.replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((q) => card(split, q)));
    document.getElementById("count").textContent =
      `${found.length.toLocaleString("en")} of ${splits[split].length.toLocaleString("en")} queries`;
    document.getElementById("page").textContent = `page ${page + 1} of ${last + 1}`;
    previous.disabled = page === 0;
    next.disabled = page === last;
  }

  function turn(by) {
    page += by;
    show();
    document.getElementById("gallery").scrollIntoView();
  }

  controls.addEventListener("input", () => { page = 0; show(); });
  controls.addEventListener("submit", (event) => event.preventDefault());
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  show();
})();
