// The settings: kept in this browser, turned into fields of a request.

import { byId } from "./dom.js";

const STORE = "mixbit.settings";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const form = byId("settings-form");
const fields = form.elements;

function load() {
  const values = JSON.parse(localStorage.getItem(STORE) ?? "{}");
  for (const [name, value] of Object.entries(values)) if (fields[name]) fields[name].value = value;
}

function save() {
  localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(new FormData(form))));
}

/** The tools as a list; null if there are none. Marks the field if they are no list in JSON. */
function tools() {
  const text = fields.tools.value.trim();
  let value = null;
  try {
    value = text ? JSON.parse(text) : null;
    fields.tools.setCustomValidity(value === null || Array.isArray(value) ? "" : "The tools must be a JSON list.");
  } catch (error) {
    fields.tools.setCustomValidity(`The tools are not JSON: ${error.message}`);
  }
  return value;
}

/** Show the panel at the field that is wrong, if one is; whether all are right. */
export function settingsAreRight() {
  tools();
  if (form.checkValidity()) return true;
  toggle(true);
  const wrong = form.querySelector("input:invalid, textarea:invalid");
  wrong.closest("details")?.setAttribute("open", "");
  form.reportValidity();
  return false;
}

export const systemPrompt = () => fields.system.value.trim();

/** Fields of the request; what is empty is left to the model's defaults. */
export function requestFields() {
  const found = {};
  for (const name of NUMBERS) if (fields[name].value !== "") found[name] = fields[name].valueAsNumber;
  const list = tools();
  if (list?.length) found.tools = list;
  if (!byId("thinking").hidden && fields.thinking.value)
    found.chat_template_kwargs = { enable_thinking: fields.thinking.value === "true" };
  return found;
}

/** What /props tells: the model's own values, and whether its template can turn thinking on and off. */
export function showDefaults(props) {
  for (const name of ["temperature", "top_p", "top_k", "min_p"]) {
    const value = props.default_generation_settings.params[name];
    fields[name].placeholder = name === "top_k" && !value ? "off" : String(Math.round(value * 1e4) / 1e4);
  }
  byId("thinking").hidden = !props.chat_template.includes("enable_thinking");
}

function toggle(open) {
  byId("settings").hidden = !open;
  byId("settings-toggle").setAttribute("aria-expanded", String(open));
  localStorage.setItem("mixbit.settings-open", String(open));
}

export function startSettings() {
  load();
  const narrow = matchMedia("(max-width: 860px)").matches;
  toggle(!narrow && localStorage.getItem("mixbit.settings-open") === "true");
  form.addEventListener("input", save);
  form.addEventListener("reset", () => setTimeout(save));
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("settings-toggle").addEventListener("click", () => {
    toggle(byId("settings").hidden);
    if (!byId("settings").hidden) fields.system.focus();
  });
  byId("settings-close").addEventListener("click", () => {
    toggle(false);
    byId("settings-toggle").focus();
  });
}
