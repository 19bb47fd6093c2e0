// Puts the page together: language, colours, key, tabs, and who is told when the state changes.

import { call, currentKey } from "./common/api.js";
import { AskPanel } from "./ask/ask.js";
import { BatchPanel } from "./batch/batch.js";
import { EnginePanel } from "./engine/engine.js";
import { Figures } from "./engine/figures.js";
import { Live } from "./engine/live.js";
import { find, recall, remember, setText } from "./common/elements.js";
import { explain } from "./common/errors.js";
import { chooseLanguage, currentLanguage, say, setLanguage, translate } from "./common/translations.js";

const live = new Live();
const engine = new EnginePanel(live);
const figures = new Figures(live);
const ask = new AskPanel(live);
const batch = new BatchPanel(live);

function show() {
  engine.show();
  figures.show();
  batch.show();
  showModel();
  find("key-button").hidden = live.state !== "key" && !currentKey();
}

/** What only the demo model's readers need to know stays in their sight. */
function showModel() {
  const { engines = [], launchers = [] } = live.status ?? {};
  const models = [...engines, ...launchers].map((one) => one.model).filter(Boolean);
  const isDemo = models.includes("demo");
  find("demo-note").hidden = !isDemo;
  if (models.length) ask.showModel(isDemo);
  ask.showChats(live.status?.limits.chats !== false);
}

function changeLanguage(name) {
  setLanguage(name);
  translate(document);
  ask.translate();
  batch.translate();
  show();
}

function prepareChoices() {
  const language = find("language");
  setLanguage(chooseLanguage(recall("page.language"), navigator.languages));
  language.value = currentLanguage();
  language.addEventListener("change", () => {
    remember("page.language", language.value);
    changeLanguage(language.value);
  });
  const theme = find("theme");
  theme.value = recall("page.theme") ?? "auto";
  theme.addEventListener("change", () => {
    remember("page.theme", theme.value);
    document.documentElement.dataset.chosenTheme = theme.value;
    document.dispatchEvent(new Event("themechange"));
  });
}

const TABS = ["ask", "batch"];
const KEY_FORM = /^[\x20-\x7e]+$/; // what a header can carry

function openTab(name, { takesFocus = false } = {}) {
  for (const one of TABS) {
    const tab = find(`tab-${one}`);
    const isOpen = one === name;
    tab.setAttribute("aria-selected", String(isOpen));
    tab.tabIndex = isOpen ? 0 : -1;
    find(`panel-${one}`).hidden = !isOpen;
    if (isOpen && takesFocus) tab.focus();
  }
}

function prepareTabs() {
  for (const name of TABS) find(`tab-${name}`).addEventListener("click", () => openTab(name));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -TABS.length, End: TABS.length }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = TABS.findIndex((name) => find(`tab-${name}`).getAttribute("aria-selected") === "true");
    const next = Math.abs(step) === 1 ? (now + step + TABS.length) % TABS.length : step > 0 ? TABS.length - 1 : 0;
    openTab(TABS[next], { takesFocus: true });
  });
}

/** A file may be dropped anywhere; else the browser would leave the page for it. */
function prepareDrop() {
  const carriesFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const light = (isOn) => find("drop").classList.toggle("over", isOn);
  addEventListener("dragover", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    openTab("batch");
    light(true);
  });
  addEventListener("dragleave", (event) => event.relatedTarget ?? light(false));
  addEventListener("drop", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    light(false);
    if (event.dataTransfer.files[0]) batch.takeFile(event.dataTransfer.files[0]);
  });
}

function prepareKey() {
  const dialog = find("key-dialog");
  const field = find("key");
  let wasAsked = false;
  const fail = (text) => {
    setText(find("key-error"), text);
    find("key-error").hidden = !text;
  };
  const open = () => {
    if (dialog.open) return;
    field.value = "";
    fail("");
    find("key-forget").hidden = !currentKey();
    dialog.showModal();
    field.focus();
  };
  const use = (key) => {
    wasAsked = true;
    ask.changeKey(key);
    dialog.close();
    live.look();
  };
  find("key-button").addEventListener("click", open);
  find("key-cancel").addEventListener("click", () => dialog.close());
  find("key-forget").addEventListener("click", () => use(""));
  find("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const key = field.value.trim();
    if (!key) return fail(say("key.empty"));
    if (!KEY_FORM.test(key)) return fail(say("key.unknown"));
    try {
      await call("ui/status", { keyToTry: key });
      use(key);
    } catch (error) {
      fail(error.needsKey ? say("key.unknown") : explain(error).text);
    }
  });
  // Asked for by itself once; who said no finds the button above.
  live.addEventListener("change", () => {
    if (live.state !== "key" || wasAsked) return;
    wasAsked = true;
    open();
  });
}

prepareChoices();
prepareTabs();
prepareDrop();
prepareKey();
live.addEventListener("change", show);
changeLanguage(currentLanguage());
live.start();
