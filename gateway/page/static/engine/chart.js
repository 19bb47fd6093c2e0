// A small chart of two minutes: one line, its area, and the value below the pointer.

import { make } from "../common/elements.js";
import { say, span } from "../common/translations.js";

const SPACE = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 44;
const WINDOW_S = 120;
const GAP_S = 3.5;

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export class Chart {
  #points = [];
  #last = 0;
  #line = draw("path", { class: "line" });
  #area = draw("path", { class: "area" });
  #dots = draw("path", { class: "dots" });
  #svg = draw(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
    this.#area,
    this.#line,
    this.#dots,
  );
  #tip = make("span.tip");

  /** `isSparse`: a value stands for a moment only, so it is a dot; the line only leads the eye. */
  constructor(name, format, { most = 0, isSparse = false } = {}) {
    Object.assign(this, { name, format, most, isSparse });
    this.element = make(isSparse ? "div.chart.sparse" : "div.chart", this.#svg, this.#tip);
    this.#tip.hidden = true;
    this.element.addEventListener("pointermove", (event) => this.#point(event));
    this.element.addEventListener("pointerleave", () => (this.#tip.hidden = true));
  }

  show(samples, pick) {
    const last = samples.at(-1)?.at ?? 0;
    this.#last = last;
    this.#points = samples.map((sample) => ({ at: sample.at, value: pick(sample) }));
    const known = this.#points.filter((point) => point.value !== null);
    const top = Math.max(this.most, ...known.map((point) => point.value)) || 1;
    const x = (point) => (WIDTH * (1 - (last - point.at) / WINDOW_S)).toFixed(1);
    const y = (point) => (HEIGHT - 2 - (HEIGHT - 6) * (point.value / top)).toFixed(1);
    const runs = this.#cut();
    this.#line.setAttribute("d", runs.map((run) => "M" + run.map((p) => `${x(p)} ${y(p)}`).join("L") + (run.length === 1 ? "h.01" : "")).join(""));
    if (this.isSparse) this.#dots.setAttribute("d", known.map((p) => `M${x(p)} ${y(p)}h.01`).join(""));
    this.#area.setAttribute(
      "d",
      runs.filter((run) => run.length > 1).map((run) => `M${x(run[0])} ${HEIGHT}L` + run.map((p) => `${x(p)} ${y(p)}`).join("L") + `L${x(run.at(-1))} ${HEIGHT}Z`).join(""),
    );
    this.#describe(known);
  }

  /** Stretches without a gap: where nothing was known, nothing is drawn. */
  #cut() {
    const runs = [];
    let run = [];
    let before = null;
    for (const point of this.#points) {
      if (point.value === null) {
        if (!this.isSparse) before = null;
        continue;
      }
      const isNew = before === null || (!this.isSparse && point.at - before > GAP_S);
      if (isNew) runs.push((run = []));
      run.push(point);
      before = point.at;
    }
    return runs;
  }

  #describe(known) {
    const name = say(this.name);
    if (!known.length) {
      this.#svg.setAttribute("aria-label", say("live.chartEmpty", { name }));
      return;
    }
    const values = known.map((point) => point.value);
    const [now, low, high] = [values.at(-1), Math.min(...values), Math.max(...values)].map(this.format);
    this.#svg.setAttribute("aria-label", say("live.chart", { name, now, low, high }));
  }

  #point(event) {
    const box = this.element.getBoundingClientRect();
    const at = this.#last - WINDOW_S * (1 - (event.clientX - box.left) / box.width);
    const known = this.#points.filter((point) => point.value !== null);
    const nearest = known.reduce((best, point) => (best && Math.abs(best.at - at) <= Math.abs(point.at - at) ? best : point), null);
    this.#tip.hidden = !nearest || Math.abs(nearest.at - at) > (this.isSparse ? 20 : 4);
    if (this.#tip.hidden) return;
    this.#tip.textContent = say("live.at", { value: this.format(nearest.value), time: span(this.#last - nearest.at) });
    const share = 1 - (this.#last - nearest.at) / WINDOW_S;
    this.#tip.style.left = `${Math.min(85, Math.max(15, share * 100))}%`;
  }
}
