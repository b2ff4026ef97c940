"use strict";
// What the page knows of the protocol, and of tokens; nothing here touches the document.

class Trouble extends Error { // what went wrong, in words; `kind` says what can be done about it
  constructor(message, kind = "") { super(message); this.kind = kind; }
}

async function fetched(path, key, options = {}) {
  const headers = {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
  let response;
  try {
    response = await fetch(path, {...options, headers, credentials: "omit"});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server does not answer. Is “lowbit serve” still running?", "again");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? `HTTP ${response.status} ${response.statusText}`;
  if (response.status === 401) throw new Trouble(key ? `The key was refused: ${said}` : said, "key");
  if (response.status === 429) {
    const wait = response.headers.get("Retry-After");
    throw new Trouble(`The server is busy${wait ? `; it asks to wait ${wait} s` : ""}: ${said}`, "again");
  }
  throw new Trouble(said, response.status >= 500 ? "again" : "");
}

async function* events(response) { // the JSON of each server-sent event, to the end that the server announces
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The connection broke in the middle of the answer.", "again");
    }
    if (part.done) throw new Trouble("The answer ended without its end: the server may have stopped.", "again");
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Trouble(event.error.message ?? "The server failed.", "again");
      yield event;
    }
  }
}

// One answer as it arrives. tokens: {text, bytes, logprob, top: [{text, logprob}]}, empty where a server sends none.
async function stream(answer, request, key, signal, changed) {
  const sent = performance.now();
  const response = await fetched(request.path, key, {method: "POST", body: JSON.stringify(request.body), signal});
  for await (const event of events(response)) {
    if (event.usage) answer.usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) continue;
    const text = choice.delta ? choice.delta.content ?? "" : choice.text ?? "";
    const tokens = tokensOf(choice.logprobs);
    if (text || tokens.length) {
      const now = performance.now();
      answer.first ??= now - sent;
      answer.last = now - sent;
    }
    answer.text += text;
    answer.tokens.push(...tokens);
    answer.finish = choice.finish_reason ?? answer.finish;
    changed();
  }
}

function tokensOf(logprobs) { // of a chat (content) or of a completion (parallel lists)
  if (logprobs?.content) {
    const token = t => ({text: t.token, bytes: t.bytes, logprob: t.logprob});
    return logprobs.content.map(t => ({...token(t), top: (t.top_logprobs ?? []).map(token)}));
  }
  return (logprobs?.tokens ?? []).map((text, i) => ({
    text, bytes: null, logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([text, logprob]) => ({text, logprob})),
  }));
}

function requestOf(model, turn, history, settings) {
  const {temperature, top_p, seed, max_tokens, system} = settings;
  const body = {model, temperature, top_p, seed, max_tokens, stream: true, stream_options: {include_usage: true}};
  if (turn.mode === "text") return {path: "/v1/completions", body: {...body, prompt: turn.prompt, logprobs: 5}};
  const messages = [...(system ? [{role: "system", content: system}] : []), ...history, {role: "user", content: turn.prompt}];
  return {path: "/v1/chat/completions", body: {...body, messages, logprobs: true, top_logprobs: 5}};
}

const same = (a, b) => a.text === b.text && String(a.bytes ?? "") === String(b.bytes ?? "");

// Where two answers part: {at, ended} in tokens, {chars} where no tokens came, null while they agree.
function parting(a, b) {
  if (a.tokens.length && b.tokens.length) {
    const length = Math.min(a.tokens.length, b.tokens.length);
    for (let at = 0; at < length; at++) if (!same(a.tokens[at], b.tokens[at])) return {at, ended: null};
    for (const [shorter, longer] of [[a, b], [b, a]]) {
      if (shorter.finish === "stop" && longer.tokens.length > length) return {at: length, ended: shorter};
    }
    return null;
  }
  const length = Math.min(a.text.length, b.text.length);
  for (let at = 0; at < length; at++) if (a.text[at] !== b.text[at]) return {chars: at};
  const longer = a.text.length > length ? a : b, shorter = longer === a ? b : a;
  return shorter.finish === "stop" && longer.text.length > length ? {chars: length} : null;
}

function agreed(a, b) { // tokens that both wrote alike, from the start
  return parting(a, b)?.at ?? Math.min(a.tokens.length, b.tokens.length);
}

// The part of an answer's text that its token number `at` wrote, as [start, end] in characters.
function placeOf(answer, at, other) {
  const start = written(answer, at);
  let end = start, next = at;
  while (end === start && next < answer.tokens.length) end = written(answer, ++next); // a part of a character shows nothing
  if (start !== null && end !== null) return [start, end];
  const limit = Math.min(answer.text.length, other.text.length);
  let common = 0;
  while (common < limit && answer.text[common] === other.text[common]) common++;
  return [common, Math.min(answer.text.length, common + (answer.tokens[at]?.text.trim().length || 1))];
}

function written(answer, count) { // characters of the text that the first `count` tokens wrote; null if they do not fit it
  const tokens = answer.tokens.slice(0, count);
  let prefix = tokens.map(t => t.text).join("");
  if (tokens.every(t => t.bytes)) {
    prefix = new TextDecoder().decode(new Uint8Array(tokens.flatMap(t => t.bytes)), {stream: true});
  }
  for (const shown of [prefix, prefix.trimStart()]) if (answer.text.startsWith(shown)) return shown.length;
  return null;
}
