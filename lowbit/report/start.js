"use strict";
// What the page can do beyond being read: draw its charts, sort and filter its tables, look through changed choices.
// Tables are complete without it. What a reader has chosen is kept by the names of tables and sections, so that it
// survives when the page's content is replaced (live.js).

const chosen = { words: "", sorts: new Map(), flips: new Map() };

// ---- charts: the expression interpreter keeps eval out of the page's security policy, and the loader refuses
// addresses, so a chart can show nothing but the page's own data.

const refuse = { load: (uri) => Promise.reject(new Error("a report loads nothing: " + uri)), sanitize: (uri) => Promise.reject(new Error("a report links nothing: " + uri)) };

function draw(root) {
  return Promise.all([...root.querySelectorAll('script[type="application/json"][data-chart]')].map((spec) => {
    const place = document.getElementById(spec.dataset.chart);
    if (place.dataset.drawn) return null;
    return window.vegaEmbed(place, JSON.parse(spec.textContent), { mode: "vega-lite", renderer: "svg", actions: false, ast: true, loader: refuse })
      .then(() => { place.dataset.drawn = "yes"; })
      .catch((error) => {
        place.className = "failed";
        place.textContent = "This chart could not be drawn: " + error.message;
        console.error(error);
      });
  }));
}

// ---- sorting: a click on a column's head, or Enter on it, sorts up, down, and back as it was.

const FACTORS = { kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, min: 60, h: 3600 };

/** What a cell says, without the small print under it. */
function main(cell) {
  const first = cell && cell.firstChild;
  return first && first.nodeType === Node.TEXT_NODE ? first.textContent.trim() : "";
}

/** A number with its unit as one value ("1.94 GB", "2 h 05 min", "<0.001", "−3.1 pp"), or NaN. */
function amount(words) {
  const text = words.replace(/[,\u00a0]/g, "").replace(/\u2212/g, "-");
  const time = text.match(/^(\d+) h (\d+) min$/);
  if (time) return 3600 * time[1] + 60 * time[2];
  const found = text.match(/^([<>]?)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-zA-Z]*)/);
  if (!found) return NaN;
  return Number(found[2]) * (FACTORS[found[3]] || 1) * (found[1] === "<" ? 0.999 : found[1] === ">" ? 1.001 : 1);
}

function rank(column, numeric, down) {
  const sign = down ? -1 : 1;
  return (a, b) => {
    const [x, y] = [main(a.cells[column]), main(b.cells[column])];
    const [u, v] = numeric ? [amount(x), amount(y)] : [x, y];
    const [lost, missing] = numeric ? [Number.isNaN(u), Number.isNaN(v)] : [x === "" || x === "–", y === "" || y === "–"];
    if (lost || missing) return lost - missing || a.dataset.at - b.dataset.at;  // what is not known stands last
    const order = numeric ? u - v : u.localeCompare(v, undefined, { numeric: true });
    return sign * order || a.dataset.at - b.dataset.at;
  };
}

function sort(table) {
  const { column = -1, down = false } = chosen.sorts.get(table.dataset.key) || {};
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
  const numeric = column >= 0 && heads[column].dataset.numeric === "yes";
  for (const body of table.tBodies) {
    const fixed = [...body.rows].filter((row) => row.matches(".reference, .family"));
    const others = [...body.rows].filter((row) => !row.matches(".reference, .family"));
    others.sort(column < 0 ? (a, b) => a.dataset.at - b.dataset.at : rank(column, numeric, down));
    body.append(...fixed, ...others);
  }
}

function makeSortable(table) {
  const rows = [...table.querySelectorAll("tbody tr")];
  if (rows.length < 2) return;
  rows.forEach((row, i) => { row.dataset.at = i; });
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const counts = rows.every((row) => /^(\d+|–)$/.test(main(row.cells[column])));
    head.dataset.numeric = counts || head.matches(".num") ? "yes" : "no";
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = chosen.sorts.get(table.dataset.key);
      const same = now && now.column === column;
      if (same && now.down) chosen.sorts.delete(table.dataset.key);
      else chosen.sorts.set(table.dataset.key, { column, down: Boolean(same) });
      sort(table);
    });
  });
  sort(table);
}

// ---- filtering: rows that hold every word; a word that is part of a candidate's name chooses columns where each
// candidate has one, and all of a table that is about one candidate.

function holds(text, words) {
  return words.every((word) => text.includes(word));
}

function filterTable(table, words, flips) {
  const heads = [...table.tHead.rows[0].cells];
  const columns = heads.map((head) => (head.dataset.about || "").toLowerCase());
  const naming = words.filter((word) => columns.some((label) => label.includes(word)));
  const rest = words.filter((word) => !naming.includes(word));
  if (columns.some(Boolean)) {
    const away = columns.map((label) => label !== "" && !holds(label, naming));
    for (const row of table.rows) [...row.cells].forEach((cell, i) => { cell.hidden = away[i]; });
  }
  const about = (table.dataset.about || "").toLowerCase();
  let shown = 0, all = 0;
  for (const body of table.tBodies) {
    let alive = 0;
    for (const row of body.rows) {
      if (row.matches(".family")) continue;
      const text = row.textContent.toLowerCase();
      const kept = holds(about + " " + text, rest) && (!flips || ((!flips.kind || row.dataset.flip === flips.kind) && holds(text, flips.words)));
      row.hidden = !kept && !row.matches(".reference");
      alive += kept;
      all += 1;
    }
    for (const row of body.querySelectorAll("tr.family")) row.hidden = alive === 0;
    shown += alive;
  }
  table.parentElement.toggleAttribute("data-empty", all > 0 && shown === 0);
  return [shown, all];
}

function filter(root) {
  const words = chosen.words.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0, all = 0;
  for (const table of root.querySelectorAll("table[data-table]:not([data-fixed])")) {
    const section = table.closest("section.flips");
    const listed = section && table.querySelector("tr[data-flip]");
    const counts = filterTable(table, words, listed ? chosen.flips.get(section.id) : null);
    shown += counts[0];
    all += counts[1];
  }
  for (const item of root.querySelectorAll("li[data-about]")) item.hidden = !holds(item.textContent.toLowerCase(), words);
  for (const fold of root.querySelectorAll("details")) {
    const inside = [...fold.querySelectorAll(".scroll, li[data-about]")];
    fold.hidden = inside.length > 0 && inside.every((part) => part.hidden || part.hasAttribute("data-empty"));
  }
  const said = document.getElementById("found");
  if (said) said.textContent = words.length ? shown + " of " + all + " rows" : "";
}

function field(words, label) {
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = words;
  box.setAttribute("aria-label", label);
  return box;
}

function makeTools() {
  const place = document.getElementById("tools");
  if (!place || place.hasChildNodes()) return;
  const box = field("Filter: part of a candidate, a task, a verdict …", "Filter candidates and tasks");
  const said = document.createElement("output");
  said.id = "found";
  box.addEventListener("input", () => { chosen.words = box.value; filter(document); });
  place.append(box, said);
}

// ---- changed choices: by kind, and by what the texts say.

function makeBrowser(section) {
  const rows = [...section.querySelectorAll("tr[data-flip]")];
  if (!rows.length) return;
  const now = chosen.flips.get(section.id) || { kind: "", words: [], typed: "" };
  chosen.flips.set(section.id, now);
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Choose among changed choices");
  const buttons = ["", "lost", "gained", "other"].map((kind) => {
    const count = rows.filter((row) => !kind || row.dataset.flip === kind).length;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = (kind || "all") + " " + count;
    button.dataset.kind = kind;
    button.addEventListener("click", () => { now.kind = kind; show(); });
    return button;
  });
  const box = field("Search in the texts", "Search in the texts of changed choices");
  box.value = now.typed;
  box.addEventListener("input", () => {
    now.typed = box.value;
    now.words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    show();
  });
  function show() {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === now.kind));
    filter(document);
    if (now.words.length) for (const fold of section.querySelectorAll("details")) fold.open = !fold.hidden;
  }
  bar.append(...buttons, box);
  section.querySelector("details").before(bar);
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === now.kind));
}

/** Keys for the tables: those of several models have one name. */
function number(root) {
  const named = new Map();
  for (const table of root.querySelectorAll("table[data-table]")) {
    const before = named.get(table.dataset.table) || 0;
    named.set(table.dataset.table, before + 1);
    table.dataset.key = table.dataset.table + " " + before;
  }
}

function arrange(root) {
  number(root);
  for (const table of root.querySelectorAll("table[data-table]")) makeSortable(table);
  for (const section of root.querySelectorAll("section.flips")) makeBrowser(section);
  if (root.querySelector("table[data-table]:not([data-fixed])")) makeTools();
  filter(root);
  return draw(root);
}

arrange(document);
