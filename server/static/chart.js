// Small charts of what happened in the last minutes.

import { h, svg } from "./dom.js";

const [WIDTH, HEIGHT, TOP] = [300, 72, 6];
const SAMPLES = 120;

/**
 * A card with a title, the newest value and a curve. series: [{name, shape: "line" | "area" | "dots", class}];
 * areas are stacked. format: of values. floor: the least upper end of the axis, of `limit` if that is fixed.
 */
export function chart({ title, series, format, floor = 1, limit = null }) {
  const value = h("b", { class: "value", text: "-" });
  const note = h("p", { class: "note" });
  const top = h("span", { class: "axis" });
  const marks = series.map(({ shape, class: kind }) => svg("path", { class: `${shape} ${kind}`, "vector-effect": "non-scaling-stroke" }));
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  picture.append(svg("path", { class: "base", d: `M0 ${HEIGHT - 0.5}H${WIDTH}M0 ${TOP}H${WIDTH}`, "vector-effect": "non-scaling-stroke" }), ...marks);
  const key = series.length > 1 ? h("p", { class: "key" }, ...series.map(({ name, class: kind }) => h("span", { class: kind, text: name }))) : null;
  const plot = h("div", { class: "plot" }, top, picture);
  const card = h("section", { class: "card chart", "aria-label": title }, h("header", {}, h("h3", { text: title }), value), plot, key, note);
  const history = [];

  /** values: one for each series, null where there is none. */
  function push(values, { text, said = "" }) {
    history.push(values);
    if (history.length > SAMPLES) history.shift();
    value.textContent = text;
    note.textContent = said;
    const stacked = history.map((sample) => stack(sample, series));
    const high = limit?.() ?? Math.max(floor, ...stacked.flat().filter((each) => each !== null));
    top.textContent = format(high);
    const x = (index) => WIDTH - ((history.length - 1 - index) * WIDTH) / (SAMPLES - 1);
    const y = (number) => HEIGHT - (Math.min(number, high) / high) * (HEIGHT - TOP);
    marks.forEach((mark, at) => mark.setAttribute("d", path(stacked, at, series[at].shape, x, y)));
    picture.setAttribute("aria-label", `${title}: now ${text}; the axis ends at ${format(high)}`);
  }
  return { card, push };
}

function stack(sample, series) {
  let sum = 0;
  return sample.map((value, at) => {
    if (series[at].shape !== "area" || value === null) return value;
    sum += value;
    return sum;
  });
}

function path(samples, at, shape, x, y) {
  const place = (number) => number.toFixed(1);
  const points = samples.map((sample, index) => (sample[at] === null ? null : [place(x(index)), place(y(sample[at]))]));
  if (shape === "dots") return points.map((point) => (point ? `M${point[0]} ${point[1]}h0` : "")).join("");
  if (shape === "line") return points.map((point, index) => (point ? `${points[index - 1] ? "L" : "M"}${point.join(" ")}` : "")).join("");
  const lower = (index) => place(y(at ? samples[index][at - 1] : 0));
  const back = points.map((point, index) => `L${point[0]} ${lower(index)}`).reverse();
  return points.length > 1 ? `M${points.map((point) => point.join(" ")).join("L")}${back.join("")}Z` : "";
}
