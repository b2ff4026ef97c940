
// While a study runs: asks the page's own server how far it is, and replaces the content when there are new findings.
// What the reader has opened, sorted, filtered and scrolled to stays; charts that did not change are not drawn again.

function texts(tag, lines, kind) {
  const list = document.createElement(tag);
  if (kind) list.className = kind;
  for (const line of lines) {
    const item = document.createElement("li");
    item.textContent = line;
    list.append(item);
  }
  return list;
}

function tell(news) {
  const place = document.getElementById("live");
  place.hidden = false;
  const bar = document.createElement("progress");
  bar.max = Math.max(1, news.cells);
  bar.value = news.done;
  bar.setAttribute("aria-label", news.sentence);
  const words = document.createElement("p");
  words.textContent = news.sentence;
  place.replaceChildren(bar, words, texts("ul", news.running), texts("ul", news.trouble, "worse"));
}

/** The part of the page that the reader looks at, and how far below the upper edge it stands. */
function anchor() {
  const parts = [...document.querySelectorAll("main section, main details, main h1, main figure")];
  const found = parts.map((part, i) => [i, part.getBoundingClientRect()]).filter(([, box]) => box.height > 0 && box.top <= 80).pop();
  return found ? { text: name(parts[found[0]]), top: found[1].top } : { text: "", top: 0 };
}

function name(part) {
  const table = part.matches("details") && part.querySelector("table");
  if (table) return "table " + table.dataset.key;  // the words of its line may hold counts that change
  const head = part.matches("h1") ? part : part.querySelector("h2, h3, summary");
  return part.tagName + " " + (part.id || (head && head.textContent) || "");
}

function hold(place) {
  if (!place.text) return;
  const part = [...document.querySelectorAll("main section, main details, main h1, main figure")].find((one) => name(one) === place.text);
  if (part) window.scrollBy({ top: part.getBoundingClientRect().top - place.top, behavior: "instant" });
}

async function replace(markup) {
  const main = document.querySelector("main");
  const place = anchor();
  const focused = document.activeElement && document.activeElement.getAttribute("aria-label");
  const folds = new Map([...main.querySelectorAll("details")].map((fold) => [name(fold), fold.open]));
  const specs = new Map([...main.querySelectorAll("script[data-chart]")].map((spec) => [spec.dataset.chart, spec.textContent]));
  const next = document.createElement("template");
  next.innerHTML = markup;
  number(next.content);
  for (const fold of next.content.querySelectorAll("details")) {
    if (folds.has(name(fold))) fold.open = folds.get(name(fold));
  }
  for (const spec of next.content.querySelectorAll("script[data-chart]")) {
    const old = document.getElementById(spec.dataset.chart);
    const fresh = next.content.getElementById(spec.dataset.chart);
    if (old && old.dataset.drawn && specs.get(spec.dataset.chart) === spec.textContent) fresh.replaceWith(old);
  }
  main.replaceChildren(next.content);
  const drawn = arrange(main);
  hold(place);
  if (focused && document.activeElement === document.body) {
    const again = [...main.querySelectorAll("input")].find((box) => box.getAttribute("aria-label") === focused);
    if (again) again.focus({ preventScroll: true });
  }
  await drawn;
  hold(place);
}

let version = document.getElementById("live").dataset.version;

async function look() {
  try {
    const news = await (await fetch("state", { cache: "no-store" })).json();
    tell(news);
    if (news.version !== version) {
      const found = await (await fetch("content", { cache: "no-store" })).json();
      document.title = found.title;
      document.querySelector("header h1").textContent = found.title;
      document.querySelector("header .byline").textContent = found.byline;
      await replace(found.main);
      version = found.version;
      document.getElementById("live").dataset.version = version;
    }
  } catch (error) {
    tell({ cells: 1, done: 0, sentence: "The page no longer hears from lowbit report --watch: " + error.message, running: [], trouble: [] });
  }
  setTimeout(look, 1000);
}

look();
