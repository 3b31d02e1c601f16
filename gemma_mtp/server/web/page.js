"use strict";
// A small chat over the server's own API. Text only ever goes into the page as text.

const $ = (id) => document.getElementById(id);
const turns = []; // the conversation: {role, content}
let running = null; // the AbortController of the answer that streams now

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function add(parent, kind, text, name = "span") {
  const element = document.createElement(name);
  element.className = kind;
  element.textContent = text;
  parent.append(element);
  return element;
}

function atEnd(change) {
  const log = $("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (follows) log.scrollTop = log.scrollHeight;
}

async function fault(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch (error) {
    return `The server answered with ${response.status}.`;
  }
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await fault(response));
    const model = (await response.json()).data[0];
    $("model").textContent = `${model.id}, drafts by ${model.drafter}`;
    $("mode").value = model.chat_template ? "chat" : "completion";
  } catch (error) {
    $("model").textContent = error.message;
    $("settings").open = true;
  }
}

function asked() {
  const draft = $("draft").value;
  const common = {
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    seed: Number($("seed").value),
    draft: /^\d+$/.test(draft) ? Number(draft) : draft,
  };
  if ($("mode").value === "chat") return ["v1/chat/completions", { ...common, messages: turns }];
  return ["v1/completions", { ...common, prompt: turns.map((turn) => turn.content).join("") }];
}

// The events of a stream, parsed, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice("data: ".length));
    }
  }
}

function meter() {
  let first = null, tokens = 0, drafted = 0;
  return (choice) => {
    const now = performance.now();
    if (first === null) first = now;
    else tokens += choice.tokens;
    if (choice.origin === "draft") drafted += choice.tokens;
    const seconds = (now - first) / 1000;
    if (seconds > 0.1) showSpeed(tokens / seconds, drafted / (tokens + 1));
  };
}

function showSpeed(perSecond, drafted) {
  $("speed").textContent = `${perSecond.toFixed(1)} tokens/s, ${Math.round(100 * drafted)} % drafted`;
}

function summary({ usage, timings }) {
  const kept = timings.draft_n ? `, ${timings.draft_n_accepted} of ${timings.draft_n} drafts kept` : "";
  return `${usage.completion_tokens} tokens, ${timings.predicted_per_second.toFixed(1)} tokens/s${kept}`;
}

async function answer() {
  const turn = { role: "assistant", content: "" };
  const [path, body] = asked();
  const element = add($("log"), "turn model", "", "div");
  const measure = meter();
  running = new AbortController();
  busy(true);
  try {
    const request = { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal };
    const response = await fetch(path, request);
    if (!response.ok) throw new Error(await fault(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice) {
        const { timings, usage } = event;
        if (usage.completion_tokens) showSpeed(timings.predicted_per_second, timings.draft_n_accepted / usage.completion_tokens);
        atEnd(() => add(element, "note", summary(event)));
        continue;
      }
      const text = choice.text ?? choice.delta.content ?? "";
      const reasoning = choice.delta?.reasoning_content ?? "";
      turn.content += text;
      if (choice.origin) measure(choice);
      if (reasoning) atEnd(() => add(element, `reasoning ${choice.origin}`, reasoning));
      if (text) atEnd(() => add(element, choice.origin ?? "", text));
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    atEnd(() => add(element, stopped ? "note" : "note fault", stopped ? "stopped" : error.message));
  }
  turns.push(turn);
  running = null;
  busy(false);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("again").disabled = yes || !turns.length;
  $("clear").disabled = yes;
  if (!yes) $("text").focus();
}

function send(event) {
  event.preventDefault();
  const content = $("text").value;
  if (running || !content) return;
  turns.push({ role: "user", content });
  add($("log"), "turn user", content, "div");
  $("log").scrollTop = $("log").scrollHeight;
  $("text").value = "";
  answer();
}

$("form").addEventListener("submit", send);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("stop").addEventListener("click", () => running?.abort());
$("again").addEventListener("click", () => {
  turns.pop();
  $("log").lastElementChild.remove();
  answer();
});
$("clear").addEventListener("click", () => {
  turns.length = 0;
  $("log").replaceChildren();
  $("speed").textContent = "";
  busy(false);
});
$("show").addEventListener("change", () => document.body.classList.toggle("shows", $("show").checked));
$("key").addEventListener("change", connect);
connect();
