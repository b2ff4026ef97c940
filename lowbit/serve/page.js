"use strict";
// The view. Whatever a model or the server wrote becomes a text node, never markup.

const $ = id => document.getElementById(id);
const SIDES = ["left", "right"];
const NEAR = 1.5; // times as likely: a difference that rounding weights easily turns around
const FIELDS = ["temperature", "top_p", "seed", "max_tokens"];
let models = [], turns = [], running = null, key = "";

function make(tag, classes = "", ...children) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  element.append(...children);
  return element;
}

const number = (value, digits) => value.toLocaleString("en", {maximumFractionDigits: digits, minimumFractionDigits: digits});
const percent = p => p === undefined ? "–" : p < 0.001 ? "< 0.1 %" : `${number(100 * p, p < 0.1 ? 1 : 0)} %`;
const memory = bytes => bytes >= 1e9 ? `${number(bytes / 1e9, 2)} GB` : `${number(bytes / 1e6, bytes < 1e7 ? 2 : 0)} MB`;
const probability = token => token && Number.isFinite(token.logprob) ? Math.exp(token.logprob) : undefined;
const quoted = text => make("span", "token", `“${text.replace(/\n/g, "⏎").replace(/\t/g, "⇥")}”`);
const named = side => make("span", `name ${SIDES[side]}`, models[side].id);

// -- settings --------------------------------------------------------------------------------------------------------

function settings() {
  const values = Object.fromEntries(FIELDS.map(id => [id, $(id).valueAsNumber]));
  return {...values, mode: $("mode").value, order: $("order").value, history: $("history").value, system: $("system").value.trim()};
}

function summarize() {
  const {temperature, top_p, seed, max_tokens, mode} = settings();
  const drawn = temperature > 0 ? `temperature ${temperature}, top-p ${top_p}, seed ${seed} for both` : "greedy";
  $("summary").textContent = `Settings: ${drawn}, at most ${max_tokens} tokens${mode === "text" ? ", continues the text" : ""}`;
}

// -- connection ------------------------------------------------------------------------------------------------------

async function connect() {
  try {
    const listed = (await (await fetched("/v1/models", key)).json()).data;
    models = listed.slice(0, 2).sort((a, b) => (b.bits_per_weight ?? 16) - (a.bits_per_weight ?? 16)); // the original left
    if (!models.length) throw new Trouble("The server lists no model.");
    $("unlock").hidden = true;
    $("heads").replaceChildren(...models.map((model, side) => make("div", "", named(side), " ", make("span", "facts"))));
    if (models.some(model => model.chat_template === false)) $("mode").value = "text";
    welcome();
    summarize();
    await weigh();
  } catch (error) {
    explain($("welcome"), error, connect);
  }
  ready();
}

function welcome() {
  const many = models.length > 1 ? "Two models answer the same message side by side; the first token where they part is marked." :
    "One model is served. With “lowbit serve OUT --beside MODEL” a second one answers beside it.";
  const base = $("mode").value === "text" ? " No chat template is known, so your text is continued." : "";
  $("welcome").replaceChildren(many + base);
}

async function weigh() { // memory as the server tells it; a server that tells nothing shows nothing
  let health;
  try {
    health = await (await fetched("/health", key)).json();
  } catch (error) {
    $("held").textContent = "";
    return;
  }
  $("held").textContent = health.memory_bytes ? `${memory(health.memory_bytes)} held by the server` : "";
  models.forEach((model, side) => {
    const bits = model.bits_per_weight, bytes = health.models?.[model.id]?.memory_bytes ?? model.memory_bytes;
    const facts = [bits && `${number(bits, 2)} bits a weight`, bytes && `${memory(bytes)} in memory`].filter(Boolean);
    $("heads").children[side].lastChild.textContent = facts.join(", ");
  });
}

function explain(place, error, again) { // an error in words, with what can be done about it
  const line = make("span", "trouble", error instanceof Trouble ? error.message : `This page failed: ${error.message}`);
  place.replaceChildren(line);
  if (error.kind === "key") {
    $("unlock").hidden = false;
    $("key").focus();
  } else if (error.kind === "again") {
    const button = make("button", "plain", "Try again");
    button.type = "button";
    button.onclick = again;
    place.append(" ", button);
  }
}

// -- a turn ----------------------------------------------------------------------------------------------------------

function historyOf(side, choice) {
  const done = turns.filter(turn => turn.mode === "chat" && turn.ok);
  return done.flatMap(turn => [{role: "user", content: turn.prompt},
    {role: "assistant", content: turn.answers[choice === "left" ? 0 : side].text}]);
}

function begin(prompt) {
  const now = settings();
  const turn = {prompt, mode: now.mode, greedy: now.temperature === 0, settings: now, ok: false};
  turn.histories = models.map((_, side) => now.mode === "chat" ? historyOf(side, now.history) : []);
  turn.parted = models.length > 1 && JSON.stringify(turn.histories[0]) !== JSON.stringify(turn.histories[1]);
  turn.answers = models.map(() => ({text: "", tokens: [], finish: null, usage: null, state: "waiting"}));
  turn.views = models.map((_, side) => {
    const view = {text: make("div", "text"), stats: make("p", "stats"), trouble: make("div")};
    view.box = make("section", `answer ${SIDES[side]}-side`, make("div", "who", named(side)), view.text, view.trouble, view.stats);
    view.box.setAttribute("aria-label", `Answer of ${models[side].id}`);
    return view;
  });
  turn.verdict = make("div", "verdict");
  turn.verdict.hidden = true;
  turn.box = make("article", "turn", make("p", "asked", prompt), make("div", "pair", ...turn.views.map(v => v.box)), turn.verdict);
  return turn;
}

async function run(turn) {
  const control = running = new AbortController();
  ready();
  const one = async side => {
    const answer = turn.answers[side];
    if (control.signal.aborted) { answer.state = "stopped"; return; }
    answer.state = "running";
    schedule(turn);
    try {
      const request = requestOf(models[side].id, turn, turn.histories[side], turn.settings);
      await stream(answer, request, key, control.signal, () => schedule(turn));
      answer.state = "done";
    } catch (error) {
      answer.state = error.name === "AbortError" ? "stopped" : "failed";
      if (answer.state === "failed") explain(turn.views[side].trouble, error, () => repeat(turn));
    }
  };
  if (turn.settings.order === "turns") for (const side of models.keys()) await one(side);
  else await Promise.all(models.map((_, side) => one(side)));
  running = null;
  turn.ok = turn.answers.every(answer => answer.state !== "failed" && answer.text);
  draw(turn);
  $("status").textContent = `Finished. ${turn.verdict.hidden ? "" : turn.verdict.firstChild.textContent}`;
  ready();
  await weigh();
}

function repeat(turn) {
  if (running) return;
  turns = turns.filter(other => other !== turn);
  turn.box.remove();
  send(turn.prompt);
}

function send(prompt) {
  $("welcome").hidden = true;
  const turn = begin(prompt);
  turns.push(turn);
  $("log").append(turn.box);
  follow();
  return run(turn);
}

// -- drawing ---------------------------------------------------------------------------------------------------------

function schedule(turn) { // at most once a frame, however fast tokens come
  if (turn.frame) return;
  turn.frame = requestAnimationFrame(() => { turn.frame = 0; draw(turn); });
}

function draw(turn) {
  const bottom = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 60;
  const [a, b] = turn.answers;
  const where = b && !turn.parted ? parting(a, b) : null;
  turn.answers.forEach((answer, side) => {
    const view = turn.views[side];
    view.box.classList.toggle("running", answer.state === "running");
    view.text.replaceChildren(...marked(answer, where, turn.answers[1 - side]));
    view.stats.replaceChildren(...stats(turn, answer));
  });
  if (b) judge(turn, where);
  if (bottom) follow();
}

const follow = () => window.scrollTo({top: document.documentElement.scrollHeight});

function marked(answer, where, other) {
  if (!where) return [answer.text];
  const [start, end] = where.at === undefined ? [where.chars, where.chars + 1] : placeOf(answer, where.at, other);
  if (start >= answer.text.length) return [answer.text];
  const mark = make("mark", "", answer.text.slice(start, end));
  mark.title = where.at === undefined ? "The first difference" : `Token ${where.at + 1}, the first that differs`;
  return [answer.text.slice(0, start), mark, answer.text.slice(end)];
}

function stats(turn, answer) {
  const parts = [], count = answer.usage?.completion_tokens ?? answer.tokens.length;
  if (answer.state === "waiting") return ["waits for the other answer"];
  if (answer.first === undefined) return [answer.state === "running" ? "reads the prompt …" : answer.state];
  parts.push(make("b", "", `${count}`), count === 1 ? " token" : " tokens");
  if (count > 1 && answer.last > answer.first) {
    parts.push(", ", make("b", "", number((count - 1) / (answer.last - answer.first) * 1000, 1)), " tokens/s");
    if (models.length > 1 && turn.settings.order === "together") parts.push(" (both at once)");
  }
  parts.push(", first after ", make("b", "", `${number(answer.first / 1000, 2)}\u00a0s`));
  if (answer.state === "stopped") parts.push(", stopped");
  else if (answer.finish === "length") parts.push(", cut at max tokens");
  return parts;
}

function judge(turn, where) {
  const [a, b] = turn.answers, over = turn.answers.every(answer => !["waiting", "running"].includes(answer.state));
  const state = `${over} ${JSON.stringify(where?.at ?? where?.chars ?? null)}`;
  if (turn.judged === state || (!where && !over)) return;
  turn.judged = state;
  turn.verdict.hidden = false;
  turn.verdict.replaceChildren(...(turn.parted ? [make("p", "note", "The two conversations differed before this turn, so " +
    "their tokens are not compared. “Next turn follows: the left answer, for both” keeps them comparable.")]
    : where ? difference(turn, where) : [agreement(turn)]));
}

function agreement(turn) {
  const [a, b] = turn.answers, count = agreed(a, b);
  if (!a.text || !b.text) return make("p", "note", "Nothing to compare.");
  const whole = turn.answers.every(answer => answer.state === "done");
  return make("p", "", make("b", "", count ? `All ${count} tokens agree.` : "The texts agree."),
    whole ? "" : " One answer was not finished: the rest is not compared.");
}

function agreeing(count) {
  return count === 0 ? "No token agrees" : count === 1 ? "The first token agrees" : `The first ${count} tokens agree`;
}

function difference(turn, where) {
  const sentence = make("p");
  if (where.at === undefined) {
    sentence.append(make("b", "", `The first ${where.chars} characters agree.`), " The server sent no token probabilities.");
    return [sentence];
  }
  const [a, b] = turn.answers.map(answer => answer.tokens[where.at]);
  sentence.append(make("b", "", `${agreeing(where.at)}; token ${where.at + 1} differs.`), " ");
  if (where.ended) {
    const short = turn.answers.indexOf(where.ended);
    sentence.append(named(short), " ended its answer there, ", named(1 - short), " went on with ", quoted((a ?? b).text), ".");
    return [sentence];
  }
  sentence.append(named(0), " wrote ", quoted(a.text), ", ", named(1), " wrote ", quoted(b.text), ". ", reason(turn, a, b));
  return [sentence, make("div", "pair", ...[a, b].map((token, side) => choices(side, token, [a, b])))];
}

function reason(turn, a, b) {
  if (!turn.greedy) return "Both drew with the same seed from distributions that are not equal; the draw fell between them.";
  const times = probability(a) / probability(a.top.find(token => same(token, b)));
  if (!Number.isFinite(times)) return `“${b.text.trim()}” was not among the five likeliest of ${models[0].id}: no near tie.`;
  const said = `${models[0].id} gave its token ${number(times, times < 10 ? 2 : 0)} times the probability of the other.`;
  return times < NEAR ? `A near tie: ${said}` : `No near tie: ${said}`;
}

function choices(side, chosen, both) { // what a model thought at that token: bars on one scale, most likely first
  const largest = Math.max(...both.flatMap(token => [token, ...token.top]).map(probability));
  const table = make("table", "", make("caption", "note", named(side), " gave"));
  const rows = [...chosen.top];
  if (!rows.some(token => same(token, chosen))) rows.push(chosen);
  for (const token of rows.sort((x, y) => y.logprob - x.logprob)) {
    const bar = make("span", `bar ${SIDES[side]}`);
    bar.style.width = `${100 * probability(token) / largest}%`;
    const row = make("tr", same(token, chosen) ? "chosen" : "", make("td", "", quoted(token.text)), make("td", "", bar),
      make("td", "num", percent(probability(token))));
    if (!both.some(written => same(written, token))) row.classList.add("facts");
    table.append(row);
  }
  return table;
}

// -- controls --------------------------------------------------------------------------------------------------------

function ready() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !models.length;
  $("new").disabled = !turns.length || Boolean(running);
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (running || !models.length || !prompt.trim()) return;
  $("prompt").value = "";
  grow();
  send(prompt);
});
$("prompt").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("prompt").addEventListener("input", grow);
document.addEventListener("keydown", event => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  turns = [];
  $("log").replaceChildren($("welcome"));
  $("welcome").hidden = false;
  ready();
  $("prompt").focus();
});
$("unlock").addEventListener("submit", event => {
  event.preventDefault();
  key = $("key").value;
  $("key").value = "";
  connect();
});
$("settings").addEventListener("input", summarize);
$("settings").addEventListener("toggle", follow);
$("settings").addEventListener("change", () => { if (models.length) welcome(); });
summarize();
connect();
