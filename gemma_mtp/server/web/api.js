// The server's own API, as the page uses it.

export const $ = (id) => document.getElementById(id);

export function add(parent, kind, text, name = "span") {
  const element = document.createElement(name);
  element.className = kind;
  element.textContent = text; // text only ever goes into the page as text
  parent.append(element);
  return element;
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function checked(response) {
  if (response.ok) return response;
  const text = await response.text();
  let message = `The server answered with ${response.status}.`;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // not one of the server's own answers: its status says all there is
  }
  throw new Error(message);
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

// The events of an answer to `turns` with the page's settings, as they come.
export async function* ask(turns, signal, changes = {}) {
  const draft = $("draft").value;
  const common = {
    stream: true,
    stream_options: { include_usage: true },
    timings_per_token: true,
    max_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    seed: Number($("seed").value),
    draft: /^\d+$/.test(draft) ? Number(draft) : draft,
    ...changes,
  };
  const chat = $("mode").value === "chat";
  const body = chat ? { ...common, messages: turns } : { ...common, prompt: turns.map((turn) => turn.content).join("") };
  const request = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await checked(await fetch(chat ? "v1/chat/completions" : "v1/completions", request));
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
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// The texts of a choice of a stream.
export function texts(choice) {
  return [choice.delta?.reasoning_content ?? "", choice.text ?? choice.delta?.content ?? ""];
}

export function figures({ usage, timings }) {
  const kept = timings.draft_n ? `, ${timings.draft_n_accepted} of ${timings.draft_n} drafts kept` : "";
  return `${usage.completion_tokens} tokens, ${timings.predicted_per_second.toFixed(1)} tokens/s${kept}`;
}
