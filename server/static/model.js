// The model as it is: what it is made of, and what it is doing.

import { getJson, modelPath } from "./api.js";
import { h } from "./dom.js";
import { bytes, count, plural, short } from "./format.js";
import { heatMap, layerCount, roles, widthOf, widthText } from "./heatmap.js";
import { liveCharts } from "./live.js";

let live = null;
let shown = null; // the model whose tensors are drawn
let timer = 0;

export function showModel(container, name) {
  if (!live) {
    live = liveCharts();
    container.append(h("div", { class: "made" }), h("h2", { text: "What it is doing" }), ...live.elements);
  }
  live.stop();
  live.start();
  if (name && shown !== name) loadTensors(container.querySelector(".made"), name);
}

export function hideModel() {
  live?.stop();
  clearTimeout(timer);
}

async function loadTensors(container, name) {
  clearTimeout(timer);
  try {
    const model = await getJson(`${modelPath(name)}/tensors`);
    container.replaceChildren(...made(model, container.clientWidth - (container.clientWidth < 800 ? 132 : 200)));
    shown = name;
  } catch (error) {
    container.replaceChildren(h("p", { class: "problem", role: "alert", text: error.message }));
    if (error.status === 503) timer = setTimeout(loadTensors, 1000, container, name); // it is being loaded
  }
}

/** room: pixels for the columns of the map. */
function made(model, room) {
  const fact = (name, value, note = "") => h("div", {}, h("dt", { text: name }), h("dd", {}, h("b", { text: value }), h("span", { text: note })));
  const kinds = Object.entries(model.layers).map(([kind, number]) => `${number} ${kind}`).join(", ");
  const facts = h(
    "dl",
    { class: "facts" },
    fact("Weights", short(model.parameters), model.model_type),
    fact("Size", bytes(model.size), `${model.bits_per_weight.toFixed(2)} bits a weight`),
    fact("Read for a token", bytes(model.token_bytes), "of the weights"),
    fact("Layers", count(layerCount(model.classes)), kinds),
    ...(model.experts ? [fact("Experts", `${model.experts.active} of ${model.experts.total}`, "for a token")] : []),
    fact("Context", count(model.context_length), `vocabulary ${count(model.vocab_size)}`),
    fact("Runs on", model.backend, model.backend_reason),
  );
  return [
    h("h1", { text: model.id }),
    facts,
    h("section", { class: "card wide" }, h("h2", { text: "Bits of every tensor" }), heatMap(model.classes, model.size, room), table(model.classes)),
    h("section", { class: "card wide" }, h("h2", { text: "Bytes that one token reads" }), bars(model)),
  ];
}

/** Roles by what a token reads of them, each bar in the colours of its widths. */
function bars(model) {
  const sums = roles(model.classes).map(([role, members]) => ({ role, members, sum: members.reduce((all, each) => all + each.token_bytes, 0) }));
  sums.sort((a, b) => b.sum - a.sum);
  const longest = sums[0]?.sum || 1;
  const rows = sums.map(({ role, members, sum }) => {
    const parts = members.map((each) => {
      const part = h("i", { class: `w${widthOf(each)}`, title: `${widthText(each)}: ${bytes(each.token_bytes)}` });
      part.style.width = `${(100 * each.token_bytes) / longest}%`;
      return part;
    });
    const percent = `${((100 * sum) / model.token_bytes).toFixed(1)} %`;
    return h("li", {}, h("span", { text: role }), h("div", { class: "track" }, ...parts), h("b", { text: bytes(sum) }), h("span", { class: "dim", text: percent }));
  });
  return h("ul", { class: "bars" }, ...rows);
}

/** The same as numbers. */
function table(classes) {
  const heads = ["Tensors", "Layers", "Count", "Shape", "Bits", "Group", "Mode", "Size", "Per token", "Width from"];
  const rows = classes.map((each) =>
    [
      each.role,
      ranges(each.layers),
      count(each.count),
      each.shape.join("x"),
      each.bits ?? each.dtype,
      each.group_size ?? "-",
      each.mode ?? "dense",
      bytes(each.size),
      bytes(each.token_bytes),
      source(each),
    ].map((text) => h("td", { text })),
  );
  return h(
    "details",
    { class: "numbers" },
    h("summary", { text: `As a table: ${plural(classes.length, "class").replace("classs", "classes")} of tensors` }),
    h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Table of tensors" },
      h("table", {}, h("thead", {}, h("tr", {}, ...heads.map((text) => h("th", { scope: "col", text })))), h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row))))),
  );
}

function source({ bits, overrides }) {
  if (overrides.length) return overrides.length === 1 ? overrides[0] : `${overrides[0]} and ${overrides.length - 1} more`;
  return bits === null ? "-" : "the global values";
}

/** [0, 1, 2, 5] -> "0-2, 5" */
function ranges(numbers) {
  const found = [];
  for (const number of numbers) {
    if (found.length && found.at(-1)[1] === number - 1) found.at(-1)[1] = number;
    else found.push([number, number]);
  }
  return found.map(([first, last]) => (first === last ? first : `${first}-${last}`)).join(", ") || "-";
}
