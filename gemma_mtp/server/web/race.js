// One prompt, decoded with MTP off and then with it on.

import { $, add, ask, figures, get, texts } from "./api.js";

class Lane {
  constructor(id, draft) {
    this.element = $(id);
    this.draft = draft;
    this.clear();
    this.say("");
  }

  clear() {
    this.element.querySelector(".turn").replaceChildren();
  }

  say(text) {
    this.element.querySelector(".figures").textContent = text;
  }

  show({ origin, text }) {
    add(this.element.querySelector(".turn"), origin, text);
  }

  async run(prompt, signal, plot) {
    this.came = []; // {at: ms after the first token, origin, text}
    this.tokens = [];
    this.end = null;
    this.alone = (await get("health")).running === 0;
    let first = null;
    plot.start();
    for await (const event of ask([{ role: "user", content: prompt }], signal, { draft: this.draft, return_token_ids: true })) {
      const choice = event.choices[0];
      if (!choice) {
        this.end = event;
        this.say(figures(event));
        continue;
      }
      this.tokens.push(...(choice.token_ids ?? []));
      const text = texts(choice).join("");
      if (event.timings) plot.add(event.timings);
      if (!text) continue;
      first ??= performance.now();
      const piece = { at: performance.now() - first, origin: choice.origin, text };
      this.came.push(piece);
      this.show(piece);
      this.say(`${this.tokens.length} tokens`);
    }
    if (!this.end) throw new Error("The answer broke off.");
  }

  // Shows what had come so many ms after the first token; whether that is all.
  replay(ms) {
    while (this.shown < this.came.length && this.came[this.shown].at <= ms) this.show(this.came[this.shown++]);
    const done = this.shown === this.came.length;
    this.say(done ? `done after ${(this.came.at(-1).at / 1000).toFixed(2)} s` : `${(ms / 1000).toFixed(2)} s`);
    return done;
  }
}

let lanes = [];

export async function race(prompt, signal, plot) {
  const draft = $("draft").value;
  const on = /^\d+$/.test(draft) ? Number(draft) : "auto";
  lanes = [new Lane("lane_off", "off"), new Lane("lane_on", on)];
  $("replay").hidden = true;
  verdict("");
  for (const lane of lanes) await lane.run(prompt, signal, plot);
  verdict(...outcome(lanes[0], lanes[1]));
  $("replay").hidden = !lanes.every((lane) => lane.came.length);
}

export function clearRace() {
  lanes = [new Lane("lane_off", "off"), new Lane("lane_on", "auto")];
  $("replay").hidden = true;
  verdict("");
}

function outcome(off, on) {
  const place = off.tokens.findIndex((token, i) => token !== on.tokens[i]);
  if (place >= 0 || off.tokens.length !== on.tokens.length) {
    const where = place >= 0 ? place : off.tokens.length;
    return [`The texts differ from token ${where + 1} on, which must never be. Please report it.`, true];
  }
  const same = `The texts are identical: all ${off.tokens.length} tokens were compared.`;
  const [plain, drafted] = [off, on].map((lane) => lane.end.timings.predicted_per_second);
  if (!plain || !drafted) return [`${same} That is too short to say which was faster.`];
  const company = off.alone && on.alone ? "" : " Other requests ran meanwhile, so the speeds may not compare.";
  return [`${same} MTP decoded ${(drafted / plain).toFixed(2)} times as fast.${company}`];
}

function verdict(text, fault = false) {
  $("verdict").textContent = text;
  $("verdict").classList.toggle("fault", fault);
}

// Both lanes at once, by the times at which their texts came.
$("replay").addEventListener("click", () => {
  const shown = lanes, start = performance.now();
  $("replay").disabled = true;
  for (const lane of shown) {
    lane.clear();
    lane.shown = 0;
  }
  const frame = (now) => {
    if (shown !== lanes) return; // another race has begun
    const done = shown.map((lane) => lane.replay(now - start));
    if (done.every(Boolean)) $("replay").disabled = false;
    else requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
});
