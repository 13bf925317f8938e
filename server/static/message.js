// How one message of the conversation looks.

import { copyButton, h } from "./dom.js";
import { count, plural, rate, seconds } from "./format.js";
import { render } from "./markdown.js";

const button = (text, onclick, kind = "quiet") => h("button", { type: "button", class: kind, text, onclick });

/** A message of the user; `actions.resend(text)` sends it again, changed. */
export function userMessage(message, actions) {
  const text = h("div", { class: "bubble", text: message.content });
  const tools = h("div", { class: "actions" }, button("Edit", edit), copyButton(() => message.content));
  const article = h("article", { class: "user", "aria-label": "You" }, text, tools);

  function edit() {
    const area = h("textarea", { "aria-label": "Change the message", rows: Math.min(12, message.content.split("\n").length + 1) });
    area.value = message.content;
    const leave = () => editor.replaceWith(text, tools);
    const send = () => area.value.trim() && actions.resend(area.value.trim());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const editor = h("div", { class: "editor" }, area, h("div", { class: "row" }, button("Cancel", leave), button("Send", send, "primary")));
    text.replaceWith(editor);
    tools.remove();
    area.focus();
  }
  return article;
}

/** An answer: `update()` shows what `message` has become; it streams until `message.state` is "done". */
export function assistantMessage(message, actions) {
  const summary = h("summary");
  const thoughts = h("div", { class: "prose" });
  const thinking = h("details", { class: "thinking" }, summary, thoughts);
  const text = h("div", { class: "prose" });
  const calls = h("div", { class: "calls" });
  const problem = h("div");
  const stats = h("span", { class: "stats" });
  const tools = h("div", { class: "actions" });
  const foot = h("footer", {}, stats, tools);
  const article = h("article", { class: "assistant", "aria-label": "Answer" }, thinking, text, calls, problem, foot);
  let stated = null;

  function update() {
    const streaming = message.state !== "done";
    article.setAttribute("aria-busy", String(streaming));
    article.classList.toggle("waiting", streaming && !message.content && !message.reasoning && !message.calls.length);
    thinking.hidden = !message.reasoning;
    summary.textContent = thinkingTitle(message);
    summary.classList.toggle("live", streaming && !message.content && !message.calls.length);
    if (thinking.open || !streaming) render(thoughts, message.reasoning);
    render(text, message.content);
    stats.textContent = statistics(message);
    showCalls(calls, message);
    if (stated === message.state) return;
    stated = message.state;
    if (streaming) {
      tools.replaceChildren();
      problem.replaceChildren();
      return;
    }
    problem.replaceChildren(...(message.error ? [errorBox(message.error, actions.regenerate)] : []));
    const cut = message.content && !message.calls.length && (message.finish === "length" || message.finish === "stopped");
    tools.replaceChildren(
      ...(message.content ? [copyButton(() => message.content)] : []),
      ...(message.error ? [] : [button("Regenerate", actions.regenerate)]),
      ...(cut ? [button("Continue", actions.proceed)] : []),
    );
    if (message.calls.length && message.finish === "tool_calls") calls.append(resultForm(message, actions));
  }
  thinking.addEventListener("toggle", () => thinking.open && render(thoughts, message.reasoning));
  update();
  return { article, update };
}

function thinkingTitle(message) {
  const { thoughtFor } = message.stats;
  if (message.state !== "done" && !message.content && !message.calls.length) return "Thinking";
  return thoughtFor === undefined ? "Thoughts" : `Thought for ${seconds(thoughtFor)}`;
}

/** "12 tokens · 45.1 tok/s · first after 85 ms · prompt 31, 20 cached" */
export function statistics({ state, stats, finish }) {
  const parts = [];
  if (state !== "done" && stats.first === undefined) return `waiting ${seconds(stats.waited ?? 0)}`;
  if (stats.tokens) parts.push(`${stats.exact ? "" : "~"}${plural(stats.tokens, "token")}`);
  if (stats.rate) parts.push(rate(stats.rate));
  if (stats.first !== undefined) parts.push(`first after ${seconds(stats.first)}`);
  if (stats.prompt !== undefined) parts.push(`prompt ${count(stats.prompt)}, ${count(stats.cached)} cached`);
  if (finish === "length") parts.push("cut off at the limit");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still being written
  }
}

function showCalls(container, message) {
  message.calls.forEach((call, index) => {
    const present = container.children[index];
    const card = present ?? container.appendChild(
      h("section", { class: "call", "aria-label": `Tool call ${call.name}` }, h("header", {}, h("span", { text: "tool call" }), h("b")), h("pre", { tabindex: 0 })),
    );
    card.querySelector("b").textContent = call.name;
    card.querySelector("pre").textContent = pretty(call.arguments);
  });
}

/** Where the user says what the calls gave. */
function resultForm(message, actions) {
  const areas = message.calls.map((call) =>
    h("textarea", { rows: 2, "aria-label": `Result of ${call.name}`, placeholder: `Result of ${call.name}`, spellcheck: "false" }),
  );
  const send = () => actions.answerCalls(areas.map((area) => area.value));
  return h("div", { class: "results" }, ...areas, h("div", { class: "row" }, button(`Send ${message.calls.length > 1 ? "results" : "result"}`, send, "primary")));
}

/** The result of a call, as it was given. */
export function toolMessage(message) {
  const shown = h("pre", { tabindex: 0, text: message.content || "(nothing)" });
  return h("article", { class: "tool", "aria-label": "Tool result" }, h("details", {}, h("summary", { text: `Result of ${message.name}` }), shown));
}

const TITLES = { 0: "No connection", 401: "The key is missing or wrong", 429: "The server is busy", 503: "The model is not ready", 504: "It took too long" };

function errorBox(error, retry) {
  const title = error.status === null ? "The answer broke off" : (TITLES[error.status] ?? "The request was refused");
  const when = error.retryAfter ? ` Try again in ${plural(error.retryAfter, "second")}.` : "";
  return h("div", { class: "error", role: "alert" }, h("b", { text: title }), h("p", { text: `${error.message}${when}` }), button("Try again", retry));
}
