// Widths as a picture: a row for each role of tensors, a column for each layer.

import { h, svg } from "./dom.js";
import { bytes, plural, share } from "./format.js";

const ROW = 22;
const GAP = 2;
const FLOATS = { float32: 32, float16: 16, bfloat16: 16 };

/** The name of the colour of a class: its bits, or "float". */
export const widthOf = ({ bits }) => (bits === null ? "float" : String(bits));

/** "4 bits, group 32", "float16" */
export function widthText({ bits, group_size: group, mode, dtype }) {
  return bits === null ? dtype : `${plural(bits, "bit")}, group ${group}, ${mode}`;
}

/** Roles in the order of the model: what comes before the layers, the layers, what comes after. */
export function roles(classes) {
  const found = new Map();
  for (const each of classes) found.set(each.role, [...(found.get(each.role) ?? []), each]);
  const outside = ([, members]) => members.every((each) => each.layers.length === 0);
  const [before, after] = [[], []];
  const inside = [];
  for (const entry of found) {
    if (!outside(entry)) inside.push(entry);
    else if (entry[0].startsWith("embedding")) before.push(entry);
    else after.push(entry);
  }
  return [...before, ...inside, ...after];
}

export const layerCount = (classes) => 1 + Math.max(-1, ...classes.flatMap((each) => each.layers));

/** The map, about `room` pixels wide, with its legend and a line that tells of the cell under the pointer. */
export function heatMap(classes, size, room) {
  const rows = roles(classes);
  const layers = Math.max(1, layerCount(classes));
  const cell = Math.max(9, Math.min(30, Math.floor(room / layers)));
  const width = layers * cell;
  const picture = svg("svg", { width, height: (rows.length + 1) * ROW, role: "img", "aria-label": `Bits of every class of tensor in ${layers} layers; the table below has the same` });
  const hint = "Point at a cell. Columns are layers; what is in no layer is drawn across.";
  const readout = h("p", { class: "readout", text: hint });
  rows.forEach(([role, members], row) => {
    const place = (members.every((each) => each.layers.length === 0) ? across : perLayer)(members, layers, cell);
    for (const { x, wide, tensor, where } of place) picture.append(draw(role, row, x, wide, tensor, where));
  });
  picture.append(axis(layers, cell, rows.length));
  picture.addEventListener("pointerover", (event) => {
    readout.textContent = event.target.closest("g.cell")?.querySelector("title").textContent ?? hint;
  });
  picture.addEventListener("pointerleave", () => (readout.textContent = hint));
  const labels = h("div", { class: "labels", "aria-hidden": "true" }, ...rows.map(([role]) => h("span", { text: role, title: role })));
  return h("div", { class: "heat" }, legend(classes, size), h("div", { class: "map" }, labels, h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Heat map" }, picture)), readout);
}

/** Cells of tensors that are in layers. Tensors of several widths in one layer share its place. */
function* perLayer(members, layers, cell) {
  for (let layer = 0; layer < layers; layer += 1) {
    const here = members.filter((each) => each.layers.includes(layer));
    const wide = cell / Math.max(1, here.length);
    for (const [at, tensor] of here.entries()) yield { x: layer * cell + at * wide, wide, tensor, where: `layer ${layer}` };
  }
}

function* across(members, layers, cell) {
  const wide = (layers * cell) / members.length;
  for (const [at, tensor] of members.entries()) yield { x: at * wide, wide, tensor, where: "outside the layers" };
}

function draw(role, row, x, wide, tensor, where) {
  const text = tensor.bits ?? FLOATS[tensor.dtype];
  const title = `${role}, ${where}: ${widthText(tensor)}, ${tensor.shape.join("x")}`;
  const space = Math.max(1, wide - GAP);
  const group = svg("g", { class: `cell w${widthOf(tensor)}`, "data-role": role, "data-where": where, "data-bits": tensor.bits ?? tensor.dtype });
  group.append(svg("title", { text: title }), svg("rect", { x, y: row * ROW, width: space, height: ROW - GAP, rx: 3 }));
  if (wide >= 15) group.append(svg("text", { x: x + space / 2, y: row * ROW + 14, text }));
  return group;
}

function axis(layers, cell, rows) {
  const step = [1, 2, 4, 5, 8, 10, 16, 20].find((each) => each * cell >= 26) ?? 32;
  const group = svg("g", { class: "axis" });
  for (let layer = 0; layer < layers; layer += step) group.append(svg("text", { x: (layer + 0.5) * cell - 1, y: rows * ROW + 15, text: layer }));
  return group;
}

/** The widths that there are, with their share of all bytes. */
function legend(classes, size) {
  const sizes = new Map();
  for (const each of classes) sizes.set(widthOf(each), (sizes.get(widthOf(each)) ?? 0) + each.size);
  const order = (name) => (name === "float" ? 99 : Number(name));
  const items = [...sizes].sort(([a], [b]) => order(a) - order(b)).map(([name, sum]) => {
    const text = name === "float" ? "not quantized" : plural(Number(name), "bit");
    return h("li", {}, h("i", { class: `w${name}` }), `${text} `, h("span", { class: "dim", text: `${bytes(sum)}, ${share(sum / size)}` }));
  });
  return h("ul", { class: "legend" }, ...items);
}
