// The page around the views: tabs, the model's name, how the server is, the key, the colours.

import { apiKey, getJson } from "./api.js";
import { startChat, useModel } from "./chat.js";
import { byId, h } from "./dom.js";
import { hideModel, showModel } from "./model.js";
import { showDefaults, startSettings } from "./settings.js";

const TABS = ["chat", "model"];
const THEMES = ["system", "light", "dark"];
const names = byId("model-name");
let models = [];
let locked = false; // the key is missing or wrong: its user has been told

// --- tabs: the address tells which is shown ---

function selectTab(name) {
  for (const each of TABS) {
    const tab = byId(`${each}-tab`);
    tab.setAttribute("aria-selected", String(each === name));
    tab.tabIndex = each === name ? 0 : -1;
    byId(each).hidden = each !== name;
  }
  history.replaceState(null, "", name === "chat" ? "/" : `#${name}`);
  if (name === "model") showModel(byId("model"), names.value);
  else hideModel();
}

function startTabs() {
  for (const name of TABS) {
    const tab = byId(`${name}-tab`);
    tab.addEventListener("click", () => selectTab(name));
    tab.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      const other = TABS.find((each) => each !== name);
      selectTab(other);
      byId(`${other}-tab`).focus();
    });
  }
  const fromAddress = () => selectTab(location.hash === "#model" ? "model" : "chat");
  addEventListener("hashchange", fromAddress);
  fromAddress();
}

// --- how the server is; it may answer before the model is loaded ---

function showStatus(name, text = name) {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text;
  status.dataset.state = name;
}

let timer = 0;

async function checkHealth() {
  clearTimeout(timer);
  let ready = false;
  try {
    const { status, detail } = await (await fetch("/health", { cache: "no-store" })).json();
    ready = status === "ok";
    showStatus(status, ready ? "ready" : (detail ?? status));
  } catch {
    showStatus("unreachable", "no connection");
  }
  const known = ready ? models.some((each) => each.context_length) : models.length > 0;
  if (!known && !locked) await loadModels();
  clearTimeout(timer); // another look may have ended meanwhile
  timer = setTimeout(checkHealth, ready ? 10_000 : 1000);
}

async function loadModels() {
  try {
    models = (await getJson("/v1/models")).data;
    locked = false;
    const chosen = names.value || localStorage.getItem("mixbit.model");
    names.replaceChildren(...models.map(({ id }) => h("option", { value: id, text: id })));
    names.value = models.some(({ id }) => id === chosen) ? chosen : models[0].id;
    chooseModel();
    showDefaults(await getJson("/props"));
  } catch (error) {
    if (error.status === 401) onError(error); // anything else: it is tried again with the next look at /health
  }
}

function chooseModel() {
  const model = models.find(({ id }) => id === names.value);
  localStorage.setItem("mixbit.model", model.id);
  document.title = `${model.id} · Mixbit`;
  useModel(model.id, model.context_length);
  if (!byId("model").hidden) showModel(byId("model"), model.id);
}

function onError(error) {
  if (error.status !== 401) return void checkHealth();
  locked = true;
  askForKey(apiKey.get() ? error.message : "");
}

// --- the key ---

function askForKey(problem = "") {
  byId("key").hidden = false;
  byId("key-problem").textContent = problem;
  byId("key-problem").hidden = !problem;
  byId("key-input").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

async function useKey(event) {
  event.preventDefault();
  apiKey.set(byId("key-input").value.trim());
  byId("key-dialog").close();
  models = [];
  await loadModels();
  if (models.length) byId("input").focus();
}

// --- colours ---

function applyTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  localStorage.setItem("mixbit.theme", name);
  const label = name === "system" ? "Colours: as the system" : `Colours: ${name}`;
  byId("theme").title = label;
  byId("theme").setAttribute("aria-label", label);
}

function nextTheme() {
  const now = localStorage.getItem("mixbit.theme");
  applyTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
}

const stored = localStorage.getItem("mixbit.theme");
applyTheme(THEMES.includes(stored) ? stored : "system");
byId("theme").addEventListener("click", nextTheme);
byId("key").hidden = !apiKey.get();
byId("key").addEventListener("click", () => askForKey());
byId("key-form").addEventListener("submit", useKey);
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
names.addEventListener("change", chooseModel);
startSettings();
startChat(onError);
startTabs();
checkHealth();
