// The served page: documents, the meter, questions and answers, and what was kept. No build step, nothing from elsewhere.

import { KeptText, layerName, place, unpack } from "./kept.js";

const $ = (id) => document.getElementById(id);
export const state = { model: null, documents: [], chosen: null, uploading: 0, turns: [], asking: null, kept: null };

// -- the server -------------------------------------------------------------------------------------------------------

async function api(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `The server answered with status ${response.status}.`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === ": looking for passages") yield { citing: true };
      else if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

// -- documents --------------------------------------------------------------------------------------------------------

async function add(files) {
  if (!files.length) return;
  problem("");
  const form = new FormData();
  for (const file of files) form.append("file", file);
  state.uploading += 1;
  showDocuments();
  try {
    const made = await (await api("/v1/documents", { method: "POST", body: form })).json();
    await refresh();
    choose(made.id);
  } catch (error) {
    problem(error.message);
  } finally {
    state.uploading -= 1;
    showDocuments();
  }
}

async function refresh() {
  const listed = await (await api("/v1/documents")).json();
  const before = chosen()?.status;
  state.documents = listed.data;
  if (state.chosen && !chosen()) forget();
  showDocuments();
  showCosts();
  if (chosen()?.status === "ready" && before !== "ready") showKept();
}

function choose(id) {
  if (state.chosen === id) return;
  forget();
  state.chosen = id;
  showDocuments();
  showCosts();
  showKept();
}

function forget() {
  state.asking?.abort();
  state.chosen = null;
  state.turns = [];
  $("turns").replaceChildren();
  $("again").hidden = true;
}

async function remove(id) {
  const name = state.documents.find((document) => document.id === id)?.name;
  if (!confirm(`Delete ${name}, its text and its memory?`)) return;
  try {
    await api(`/v1/documents/${id}`, { method: "DELETE" });
    if (state.chosen === id) forget();
    await refresh();
    showCosts();
    showKept();
    $("file").focus();
  } catch (error) {
    problem(error.message);
  }
}

const chosen = () => state.documents.find((document) => document.id === state.chosen);
const waits = (document) => document.status === "queued" || document.status === "compressing";

function status(document) {
  if (document.status === "failed") return `could not be read: ${document.error.message}`;
  if (document.status === "queued") return "waits for its turn";
  if (document.status === "compressing") return "is being read…";
  const pages = document.pages ? `${count(document.pages, "page")}, ` : "";
  return `${pages}${count(document.tokens_in, "token")}`;
}

function showDocuments() {
  const focused = document.activeElement?.dataset?.key;
  const items = state.documents.map((given) => {
    const open = make("button", "open", make("span", "", given.name), make("span", "quiet", status(given)));
    open.type = "button";
    open.dataset.key = `open ${given.id}`;
    open.setAttribute("aria-pressed", String(given.id === state.chosen));
    open.addEventListener("click", () => choose(given.id));
    const del = make("button", "delete", "Delete");
    del.type = "button";
    del.dataset.key = `delete ${given.id}`;
    del.setAttribute("aria-label", `Delete ${given.name}`);
    del.addEventListener("click", () => remove(given.id));
    return make("li", "", open, del);
  });
  if (state.uploading) items.unshift(make("li", "", make("span", "open quiet", "Uploading…")));
  $("documents").replaceChildren(...items);
  if (focused) $("documents").querySelector(`[data-key="${focused}"]`)?.focus();
  const about = chosen()?.name;
  $("question-label").textContent = about ? `Your question about ${about}` : "Your question, without a document";
  showAsking();
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text;
}

// -- the meter --------------------------------------------------------------------------------------------------------

function showCosts() {
  const given = chosen();
  $("costs").hidden = !given || given.full_kv_bytes === undefined;
  if ($("costs").hidden) return;
  const share = Math.min(100, (100 * given.kv_bytes) / given.full_kv_bytes);
  const done = given.tokens_done === undefined ? share : (share * given.tokens_done) / given.tokens_in;
  const meter = $("meter");
  meter.classList.toggle("busy", waits(given));
  meter.setAttribute("aria-valuenow", done.toFixed(0));
  meter.firstElementChild.style.width = `${done}%`;
  const kept = `${bytes(given.kv_bytes)} of the ${bytes(given.full_kv_bytes)} that the whole cache would take`;
  const tokens = `${number(given.kept_tokens)} of ${count(given.tokens_in, "token")} in each layer`;
  if (given.status === "ready") say("costs-text", `Kept ${kept}: ${tokens}. Read in ${number(given.seconds)} s.`);
  else if (given.status === "failed") say("costs-text", status(given));
  else if (given.tokens_done) say("costs-text", `Reading: token ${number(given.tokens_done)} of ${number(given.tokens_in)}.`);
  else say("costs-text", `Reading ${count(given.tokens_in, "token")}; about ${kept} will be kept.`);
}

// -- what was kept ----------------------------------------------------------------------------------------------------

async function showKept() {
  const id = state.chosen;
  state.kept?.close();
  state.kept = null;
  const ready = chosen()?.status === "ready";
  $("kept").hidden = $("kept-tools").hidden = !ready;
  $("kept-empty").hidden = ready;
  if (!ready) return;
  try {
    const picture = await unpack(await (await api(`/v1/documents/${id}/kept`)).json());
    if (state.chosen !== id) return;
    state.kept = new KeptText($("kept"), picture);
    $("kept").scrollTop = 0;
    $("layer").max = picture.layers.length;
    $("layer").value = 0;
    setLayer();
  } catch (error) {
    $("kept").hidden = $("kept-tools").hidden = true;
    $("kept-empty").hidden = false;
    $("kept-empty").textContent = error.message;
  }
}

function setLayer() {
  if (!state.kept) return;
  const row = Number($("layer").value);
  const name = layerName(state.kept.picture, row);
  state.kept.setLayer(row);
  $("layer-name").textContent = name;
  $("layer").setAttribute("aria-valuetext", name);
}

// -- questions --------------------------------------------------------------------------------------------------------

async function ask() {
  const question = $("question").value.trim();
  if (!question || state.asking) return;
  const answer = make("p", "answer", "…");
  const turn = make("li", "", make("p", "asked", question), answer);
  turn.setAttribute("aria-busy", "true");
  $("turns").append(turn);
  $("question").value = "";
  state.asking = new AbortController();
  showAsking();
  const messages = [...state.turns, { role: "user", content: question }];
  let text = "";
  try {
    const body = { model: state.model.id, messages, stream: true, ...(state.chosen ? { document: state.chosen } : {}) };
    const response = await api("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: state.asking.signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.citing) turn.append(make("p", "quiet looking", "Looking for the passages…"));
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) answer.textContent = text += piece;
      if (event.longfit) showFacts(turn, event);
    }
    state.turns = [...messages, { role: "assistant", content: text }];
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (!text) answer.remove();
    turn.append(make("p", stopped ? "quiet" : "problem", stopped ? "Stopped." : error.message));
    if (!text) $("question").value = question;
    else state.turns = [...messages, { role: "assistant", content: text }];
  } finally {
    turn.querySelector(".looking")?.remove();
    turn.setAttribute("aria-busy", "false");
    if (answer.textContent === "…") answer.textContent = "(no answer)";
    state.asking = null;
    showAsking();
    $("question").focus();
  }
}

function showFacts(turn, event) {
  turn.querySelector(".looking")?.remove();
  const { citations, seconds } = event.longfit;
  const cut = event.choices[0].finish_reason === "length" ? "Cut off at the longest answer. " : "";
  const items = citations.map((citation) => {
    const where = [citation.page ? `page ${citation.page}` : null, several() ? citation.document : null];
    const kept = citation.kept === null ? null : `${(100 * citation.kept).toFixed(0)} % kept`;
    const verdict = make("span", citation.verified ? "verified" : "missing", citation.verified ? "verified" : "not found");
    const line = make("span", "quiet", [...where, kept].filter(Boolean).join(" · "), " · ", verdict);
    const button = make("button", "", make("q", "", citation.quote), line);
    button.type = "button";
    button.addEventListener("click", () => cite(citation));
    return make("li", "", button);
  });
  if (items.length) {
    const list = make("ul", "citations", ...items);
    list.setAttribute("aria-label", "Passages");
    turn.append(list);
  }
  turn.append(make("p", "quiet", `${cut}Answered in ${number(seconds)} s.`));
}

const several = () => (chosen()?.files.length ?? 0) > 1;

function cite(citation) {
  if (!state.kept) return;
  const number = state.kept.picture.documents.findIndex((document) => document.name === citation.document);
  const { text } = state.kept.picture.documents[Math.max(0, number)];
  if (state.kept.cite(Math.max(0, number), place(text, citation.start), place(text, citation.end))) {
    $("kept").focus({ preventScroll: true });
  }
}

function showAsking() {
  const given = chosen();
  $("send").disabled = Boolean(state.asking) || !state.model || given?.status === "failed";
  $("stop").hidden = !state.asking;
  $("again").hidden = Boolean(state.asking) || !$("turns").childElementCount;
}

// -- small things -----------------------------------------------------------------------------------------------------

function make(tag, look, ...children) {
  const made = document.createElement(tag);
  if (look) made.className = look;
  made.append(...children);
  return made;
}

function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 });
const count = (value, name) => `${number(value)} ${name}${value === 1 ? "" : "s"}`;

function bytes(value) {
  let unit = "B";
  for (const next of ["KiB", "MiB", "GiB", "TiB"]) {
    if (value < 1024) break;
    value /= 1024;
    unit = next;
  }
  return `${value.toFixed(value < 10 && unit !== "B" ? 1 : 0)} ${unit}`;
}

// -- events -----------------------------------------------------------------------------------------------------------

$("file").addEventListener("change", () => {
  add([...$("file").files]);
  $("file").value = "";
});
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  add([...event.dataTransfer.files]);
});
$("paste-form").addEventListener("submit", (event) => {
  event.preventDefault();
  add([new File([$("pasted").value], "pasted text.txt", { type: "text/plain" })]);
  $("pasted").value = "";
  $("paste").open = false;
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
$("stop").addEventListener("click", () => state.asking?.abort());
$("again").addEventListener("click", () => {
  state.turns = [];
  $("turns").replaceChildren();
  showAsking();
  $("question").focus();
});
$("layer").addEventListener("input", setLayer);

async function watch() {
  try {
    if (state.documents.some(waits)) await refresh();
  } catch (error) {
    problem(error.message);
  }
  setTimeout(watch, 500);
}

async function start() {
  showAsking();
  try {
    state.model = (await (await api("/v1/models")).json()).data[0];
    const { method, budget, upload_limit: limit } = state.model.longfit;
    $("about").textContent = `${state.model.id} · ${method} · budget ${budget}`;
    $("formats").textContent += `, up to ${bytes(limit)}`;
    await refresh();
    if (state.documents.length) choose((state.documents.find((given) => given.status === "ready") ?? state.documents[0]).id);
  } catch (error) {
    problem(error.message);
  }
  watch();
}

start();
