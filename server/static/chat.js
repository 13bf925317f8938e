// The conversation: what was said, the answer that is being written, and what can be done with both.

import { ApiError, streamChat } from "./api.js";
import { byId, h } from "./dom.js";
import { count } from "./format.js";
import { assistantMessage, toolMessage, userMessage } from "./message.js";
import { requestFields, settingsAreRight, systemPrompt } from "./settings.js";

const STORE = "mixbit.conversation";
const [log, input, scroller] = ["log", "input", "scroll"].map(byId);
const state = { messages: [], running: null, model: null, contextLength: null, onError: () => {} };
let follow = true; // the newest text is kept in view
let frame = 0;

const newAnswer = () => ({ role: "assistant", content: "", reasoning: "", calls: [], state: "waiting", finish: null, error: null, stats: {} });

function save() {
  const messages = state.messages.map((message) => (message.role === "assistant" ? { ...message, state: "done" } : message));
  try {
    localStorage.setItem(STORE, JSON.stringify(messages));
  } catch {
    announce("The conversation is too long to be kept in this browser.");
  }
}

function load() {
  try {
    return JSON.parse(localStorage.getItem(STORE) ?? "[]");
  } catch {
    return [];
  }
}

const announce = (text) => (byId("announce").textContent = text);

/** The conversation as the API wants it. What came to nothing is left out. */
function requestMessages() {
  const found = systemPrompt() ? [{ role: "system", content: systemPrompt() }] : [];
  for (const message of state.messages) {
    if (message.role !== "assistant") {
      const { role, content, tool_call_id } = message;
      found.push({ role, content, tool_call_id });
    } else if (message.content || message.calls.length) {
      const calls = message.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
      found.push({
        role: "assistant",
        content: message.content || null,
        reasoning_content: message.reasoning || undefined,
        tool_calls: calls.length ? calls : undefined,
      });
    }
  }
  return found;
}

/** Draw the messages from `first` on; those before stay as they are. */
function draw(first = 0) {
  while (log.children.length > first) log.lastElementChild.remove();
  log.append(...state.messages.map((message, index) => (index < first ? null : view(message, index))).filter(Boolean));
  refresh();
}

function view(message, index) {
  if (message.role === "user") return userMessage(message, { resend: (text) => restart(index, [{ role: "user", content: text }]) });
  if (message.role === "tool") return toolMessage(message);
  const { article, update } = assistantMessage(message, {
    regenerate: () => restart(index, []),
    proceed: () => {
      if (!settingsAreRight()) return;
      state.messages.length = index + 1;
      draw(index);
      answer(message);
    },
    answerCalls: (results) => restart(index + 1, message.calls.map(({ id, name }, at) => ({ role: "tool", tool_call_id: id, name, content: results[at] }))),
  });
  article.update = update;
  return article;
}

function refresh() {
  byId("empty").hidden = state.messages.length > 0;
  byId("clear").disabled = state.messages.length === 0;
  byId("send").hidden = state.running !== null;
  byId("stop").hidden = state.running === null;
  const last = state.messages.findLast((message) => message.stats?.prompt !== undefined)?.stats;
  byId("context").hidden = !(last && state.contextLength);
  if (last && state.contextLength) {
    const used = last.prompt + last.tokens;
    const meter = byId("context").querySelector("meter");
    Object.assign(meter, { max: state.contextLength, high: 0.8 * state.contextLength, value: used });
    byId("context").querySelector(".context-text").textContent = `${count(used)} of ${count(state.contextLength)}`;
  }
  if (follow) scroller.scrollTop = scroller.scrollHeight;
  byId("down").hidden = follow;
}

/** Keep the messages before `index`, add `messages`, and ask for an answer. */
function restart(index, messages) {
  if (!settingsAreRight()) return;
  stop();
  state.messages = [...state.messages.slice(0, index), ...messages];
  const message = newAnswer();
  state.messages.push(message);
  follow = true;
  draw(index);
  answer(message);
}

/** Stream into `message`, which is the last; text that it has already is gone on with. */
async function answer(message) {
  stop();
  const controller = new AbortController();
  state.running = controller;
  const started = performance.now();
  Object.assign(message, { state: "waiting", finish: null, error: null, stats: { waited: 0 } });
  const article = log.lastElementChild;
  const show = () => {
    frame = 0;
    article.update();
    refresh();
  };
  const clock = setInterval(() => {
    message.stats.waited = (performance.now() - started) / 1000;
    frame ||= requestAnimationFrame(show);
  }, 200);
  announce("The answer is being written.");
  show();
  try {
    const body = { model: state.model, messages: requestMessages(), ...requestFields() };
    for await (const chunk of streamChat(body, controller.signal)) {
      take(message, chunk, (performance.now() - started) / 1000);
      frame ||= requestAnimationFrame(show);
    }
    announce(message.content || "The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") {
      message.finish = "stopped";
      announce("Stopped.");
    } else {
      const { status, code, retryAfter } = error;
      if (!(error instanceof ApiError)) console.error(error);
      message.error = { status: status ?? null, code, retryAfter, message: error.message };
      state.onError(error);
    }
  } finally {
    clearInterval(clock);
    cancelAnimationFrame(frame);
    frame = 0;
    message.state = "done";
    if (state.running === controller) state.running = null;
    show();
    save();
  }
}

/** Add what a chunk tells. seconds: since the request was sent. */
function take(message, chunk, seconds) {
  const { stats } = message;
  if (chunk.usage) {
    stats.prompt = chunk.usage.prompt_tokens;
    stats.cached = chunk.usage.prompt_tokens_details.cached_tokens;
    stats.tokens = chunk.usage.completion_tokens;
    stats.exact = true;
  }
  for (const { delta, finish_reason } of chunk.choices) {
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      stats.first ??= seconds;
      stats.last = seconds;
      stats.tokens = (stats.tokens ?? 0) + 1; // about: a delta may carry several
      message.state = "streaming";
    }
    if (delta.reasoning_content) message.reasoning += delta.reasoning_content;
    if (delta.content) message.content += delta.content;
    if (message.reasoning && (delta.content?.trim() || delta.tool_calls)) stats.thoughtFor ??= seconds - stats.first;
    for (const call of delta.tool_calls ?? []) {
      message.calls[call.index] ??= { id: call.id, name: call.function.name, arguments: "" };
      message.calls[call.index].arguments += call.function.arguments ?? "";
    }
    if (finish_reason) message.finish = finish_reason;
  }
  if (stats.last > stats.first) stats.rate = (stats.tokens - 1) / (stats.last - stats.first);
}

export function stop() {
  state.running?.abort();
  state.running = null;
}

function send(text) {
  if (!text.trim() || !settingsAreRight()) return;
  input.value = "";
  grow();
  restart(state.messages.length, [{ role: "user", content: text.trim() }]);
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function clear() {
  stop();
  state.messages = [];
  save();
  draw();
  announce("The conversation is cleared.");
  input.focus();
}

export function useModel(name, contextLength) {
  Object.assign(state, { model: name, contextLength });
  refresh();
}

export function startChat(onError) {
  state.onError = onError;
  state.messages = load();
  draw();
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!state.running) send(input.value);
  });
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  byId("stop").addEventListener("click", () => {
    stop();
    input.focus();
  });
  byId("clear").addEventListener("click", clear);
  byId("examples").addEventListener("click", (event) => event.target.matches("button") && send(event.target.textContent));
  scroller.addEventListener("scroll", () => {
    follow = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
    byId("down").hidden = follow;
  });
  byId("down").addEventListener("click", () => {
    follow = true;
    refresh();
  });
  new ResizeObserver(() => follow && (scroller.scrollTop = scroller.scrollHeight)).observe(log);
  addEventListener("pagehide", () => state.running && save());
}
