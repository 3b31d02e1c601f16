// Tokens a second, and the share of drafts that is kept, while an answer comes: both over its last second or so.

const WINDOW = 1000; // ms of decoding

export class Plot {
  constructor(figure) {
    this.figure = figure;
    this.start();
  }

  start() {
    this.seen = []; // the timings of each pass
    this.points = []; // {at, rate, kept}
  }

  clear() {
    this.start();
    this.figure.hidden = true;
  }

  add(timings) {
    const last = this.seen.at(-1);
    if (last && timings.predicted_ms <= last.predicted_ms) return; // another event of the same pass
    this.seen.push(timings);
    while (this.seen.length > 2 && timings.predicted_ms - this.seen[0].predicted_ms > WINDOW) this.seen.shift();
    const first = this.seen[0];
    if (first === timings) return;
    const drafted = timings.draft_n - first.draft_n;
    this.points.push({
      at: timings.predicted_ms,
      rate: (1000 * (timings.predicted_n - first.predicted_n)) / (timings.predicted_ms - first.predicted_ms),
      kept: drafted ? (timings.draft_n_accepted - first.draft_n_accepted) / drafted : null,
    });
    this.draw();
  }

  draw() {
    const points = this.points, last = points.at(-1);
    const most = Math.max(...points.map((point) => point.rate));
    const first = points[0].at, span = last.at - first || 1;
    const line = (kind, value) => {
      const shown = points.filter((point) => value(point) !== null);
      const ends = shown.map((point) => `${(100 * (point.at - first)) / span},${97 - 94 * value(point)}`);
      this.figure.querySelector(`polyline.${kind}`).setAttribute("points", ends.join(" "));
    };
    line("rate", (point) => point.rate / most);
    line("kept", (point) => point.kept);
    this.say("rate", `${last.rate.toFixed(0)} tokens/s, at most ${most.toFixed(0)}`);
    this.say("kept", last.kept === null ? "no drafts" : `${Math.round(100 * last.kept)} % of drafts kept`);
    this.figure.hidden = false;
  }

  say(kind, text) {
    this.figure.querySelector(`figcaption .${kind}`).textContent = text;
  }
}
