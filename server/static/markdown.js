// Text of a model as elements: the part of Markdown that models write. Everything is made of elements and text
// nodes; no text is ever read as markup of HTML.

import { copyButton, h } from "./dom.js";

const MAX_DEPTH = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

const isBlank = (line) => line.trim() === "";
const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1]);

/** The blocks of a text, each with `source`: two of the same source look the same. */
export function blocks(text) {
  const lines = text.split("\n");
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [type, end] = measure(lines, at);
    const part = lines.slice(at, end);
    found.push({ type, lines: part, source: `${type}\n${part.join("\n")}` });
    at = end;
  }
  return found;
}

/** Type of the block that begins at a line, and the line after its end. */
function measure(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return ["code", fenceEnd(lines, at, fence[1])];
  if (HEADING.test(line)) return ["heading", at + 1];
  if (RULE.test(line)) return ["rule", at + 1];
  if (QUOTE.test(line)) return ["quote", endOf(lines, at, (next) => QUOTE.test(next))];
  if (ITEM.test(line)) return ["list", listEnd(lines, at)];
  if (isTable(lines, at)) return ["table", endOf(lines, at + 2, (next) => next.includes("|"))];
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines[end]) && !isTable(lines, end)) {
    const item = ITEM.exec(lines[end]);
    if (item?.[3]) break;
    end += 1;
  }
  return ["paragraph", end];
}

function endOf(lines, at, belongs) {
  while (at < lines.length && belongs(lines[at])) at += 1;
  return at;
}

function fenceEnd(lines, at, fence) {
  const close = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
  const end = lines.findIndex((line, index) => index > at && close.test(line));
  return end < 0 ? lines.length : end + 1; // still being written
}

function listEnd(lines, at) {
  const base = ITEM.exec(lines[at])[1].length;
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const indented = line.search(/\S/) >= base + 2;
    if (isBlank(line)) {
      const next = lines[end + 1] ?? "";
      if (!ITEM.test(next) && !(next.search(/\S/) >= base + 2)) break;
    } else if (!indented && !ITEM.test(line) && (startsBlock(line) || isBlank(lines[end - 1]))) {
      break;
    }
  }
  return end;
}

/** Show `text` in `container`; elements of blocks that have not changed stay as they are. */
export function render(container, text) {
  const wanted = blocks(text);
  wanted.forEach((block, index) => {
    const present = container.children[index];
    if (present?.blockSource === block.source) return;
    const element = build(block, 0);
    element.blockSource = block.source;
    if (present) present.replaceWith(element);
    else container.append(element);
  });
  while (container.children.length > wanted.length) container.lastElementChild.remove();
}

function build(block, depth) {
  const { type, lines } = block;
  if (type === "code") return code(lines);
  if (type === "rule") return h("hr");
  if (depth >= MAX_DEPTH) return h("p", { text: lines.join("\n") });
  if (type === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return inline(h(`h${Math.min(marks.length + 2, 6)}`), text.replace(/[ \t]+#+[ \t]*$/, ""));
  }
  if (type === "quote") return nested(h("blockquote"), lines.map((line) => QUOTE.exec(line)[1]), depth);
  if (type === "list") return list(lines, depth);
  if (type === "table") return table(lines);
  return inline(h("p"), lines.map((line) => line.trimStart()).join("\n"));
}

function nested(element, lines, depth) {
  element.append(...blocks(lines.join("\n")).map((block) => build(block, depth + 1)));
  return element;
}

function code(lines) {
  const [, fence, info] = FENCE.exec(lines[0]);
  const closed = lines.length > 1 && lines.at(-1).trim().replaceAll(fence[0], "") === "" && !isBlank(lines.at(-1));
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const head = h("figcaption", {}, h("span", { text: info.trim().split(/\s/)[0] || "text" }), copyButton(() => text));
  return h("figure", { class: "code" }, head, h("pre", { tabindex: 0 }, h("code", { text })));
}

function list(lines, depth) {
  const base = ITEM.exec(lines[0])[1].length;
  const ordered = /\d/.test(ITEM.exec(lines[0])[2]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= base + 1) items.push({ lines: [item[3] ?? ""], offset: item[1].length + item[2].length + 1 });
    else items.at(-1).lines.push(line.slice(Math.min(items.at(-1).offset, Math.max(0, line.search(/\S/)))));
  }
  const first = ordered ? Number.parseInt(lines[0].trimStart(), 10) : 1;
  const element = h(ordered ? "ol" : "ul", { start: first === 1 ? null : first });
  for (const item of items) {
    const inner = nested(h("li"), item.lines, depth);
    if (inner.firstElementChild?.tagName === "P") inner.firstElementChild.replaceWith(...inner.firstElementChild.childNodes);
    element.append(inner);
  }
  return element;
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines) {
  const row = (line, tag) => h("tr", {}, ...cells(line).map((cell) => inline(h(tag), cell)));
  const body = h("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, row(lines[0], "th")), body));
}

const MARK = /\\[!-/:-@[-`{-~]|`+|\*{1,3}|_{1,3}|~~|\[|https?:\/\//g;
const LINK = /\[([^[\]\n]{1,500})\]\(([^()\s]{1,2000})\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`()[\]]*[^\s<>"'`()[\].,;:!?*_]/y;
const TAGS = { "*": ["em"], _: ["em"], "**": ["strong"], __: ["strong"], "***": ["strong", "em"], ___: ["strong", "em"], "~~": ["s"] };

/** Append the inline elements of `text`. A mark that is not closed is text. */
export function inline(parent, text, depth = 0) {
  const missing = new Set(); // marks that are not closed any more: nothing is searched twice
  let done = 0;
  const flush = (end) => end > done && parent.append(text.slice(done, end));
  MARK.lastIndex = 0;
  for (let at = 0; at < text.length; ) {
    MARK.lastIndex = at;
    const found = MARK.exec(text);
    if (!found) break;
    const mark = found[0];
    const start = found.index;
    const made = depth < MAX_DEPTH ? element(text, start, mark, missing, depth) : null;
    at = start + mark.length;
    if (!made) continue;
    flush(start);
    parent.append(made.node);
    at = done = made.end;
  }
  flush(text.length);
  return parent;
}

/** What stands at a mark and where it ends; null if the mark is only text. */
function element(text, start, mark, missing, depth) {
  const after = start + mark.length;
  if (mark[0] === "\\") return { node: document.createTextNode(mark[1]), end: after };
  if (mark === "[") {
    LINK.lastIndex = start;
    const link = LINK.exec(text);
    const node = link && anchor(link[2], link[1], depth);
    return node ? { node, end: start + link[0].length } : null;
  }
  if (mark.startsWith("http")) {
    ADDRESS.lastIndex = start;
    const address = ADDRESS.exec(text)?.[0];
    const node = address && anchor(address, null, depth);
    return node ? { node, end: start + address.length } : null;
  }
  if (missing.has(mark)) return null;
  if (mark[0] === "`") {
    const end = closing(text, after, mark, (at) => text[at - 1] !== "`" && text[at + mark.length] !== "`");
    if (end < 0) return missing.add(mark), null;
    const inner = text.slice(after, end).replaceAll("\n", " ");
    const padded = /^ .*\S.* $/.test(inner);
    return { node: h("code", { text: padded ? inner.slice(1, -1) : inner }), end: end + mark.length };
  }
  const inWord = mark[0] === "_" && /\w/.test(text[start - 1] ?? "");
  if (inWord || !/\S/.test(text[after] ?? "")) return null;
  const fits = (at) =>
    at > after && /\S/.test(text[at - 1]) && text[at + mark.length] !== mark[0] && !(mark[0] === "_" && /\w/.test(text[at + mark.length] ?? ""));
  const end = closing(text, after, mark, fits);
  if (end < 0) return missing.add(mark), null;
  const [outer, ...rest] = TAGS[mark].map((tag) => h(tag));
  outer.append(...rest);
  inline(rest[0] ?? outer, text.slice(after, end), depth + 1);
  return { node: outer, end: end + mark.length };
}

function closing(text, from, mark, fits) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at + 1)) if (fits(at)) return at;
  return -1;
}

/** A link that tells the other side nothing; null if the address is none of the web. */
function anchor(address, label, depth) {
  const url = URL.parse(address);
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  const link = h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href });
  return label === null ? (link.append(address), link) : inline(link, label, depth + 1);
}
