// A small chat over the server's own API, and a race of MTP against plain decoding.

import { $, add, ask, figures, get, texts } from "./api.js";
import { Plot } from "./plot.js";
import { clearRace, race } from "./race.js";

const turns = []; // the conversation: {role, content}
const plot = new Plot($("plot"));
let running = null; // the AbortController of what streams now

function atEnd(change) {
  const log = $("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (follows) log.scrollTop = log.scrollHeight;
}

async function connect() {
  try {
    const model = (await get("v1/models")).data[0];
    $("model").textContent = `${model.id}, drafts by ${model.drafter}`;
    $("mode").value = model.chat_template ? "chat" : "completion";
  } catch (error) {
    $("model").textContent = error.message;
    $("settings").open = true;
  }
}

// Runs `work`, which takes the signal to stop by; says what went wrong.
async function run(work, say) {
  running = new AbortController();
  busy(true);
  try {
    await work(running.signal);
  } catch (error) {
    const stopped = error.name === "AbortError";
    say(stopped ? "note" : "note fault", stopped ? "stopped" : error.message);
  }
  running = null;
  busy(false);
}

async function answer() {
  const turn = { role: "assistant", content: "" };
  const element = add($("log"), "turn model", "", "div");
  const say = (kind, text) => atEnd(() => add(element, kind, text));
  plot.start();
  await run(async (signal) => {
    for await (const event of ask(turns, signal)) {
      const choice = event.choices[0];
      if (!choice) {
        say("note", figures(event));
        continue;
      }
      if (event.timings) plot.add(event.timings);
      const [reasoning, text] = texts(choice);
      turn.content += text;
      if (reasoning) say(`reasoning ${choice.origin}`, reasoning);
      if (text) say(choice.origin ?? "", text);
    }
  }, say);
  turns.push(turn);
  busy(false);
}

function racing() {
  return !$("race").hidden;
}

function view(name) {
  for (const other of ["chat", "race"]) $(`to_${other}`).setAttribute("aria-pressed", String(other === name));
  $("log").hidden = name === "race";
  $("race").hidden = name !== "race";
  $("send").textContent = name === "race" ? "Race" : "Send";
  busy(false);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("again").hidden = racing();
  $("again").disabled = yes || !turns.length;
  for (const id of ["clear", "to_chat", "to_race"]) $(id).disabled = yes;
  if (!yes) $("text").focus();
}

function send(event) {
  event.preventDefault();
  const content = $("text").value;
  if (running || !content) return;
  if (racing()) {
    run((signal) => race(content, signal, plot), (kind, text) => ($("verdict").textContent = text));
    return;
  }
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
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
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
  clearRace();
  plot.clear();
  busy(false);
});
$("to_chat").addEventListener("click", () => view("chat"));
$("to_race").addEventListener("click", () => view("race"));
$("show").addEventListener("change", () => document.body.classList.toggle("shows", $("show").checked));
$("key").addEventListener("change", connect);
connect();
