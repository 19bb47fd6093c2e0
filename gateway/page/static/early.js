// Runs before the first paint, so that the page never shows in the wrong colours.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const read = (name) => {
    try {
      return localStorage.getItem(name);
    } catch {
      return null; // storage can be forbidden; then choices last as long as the page
    }
  };
  const apply = () => {
    const chosen = document.documentElement.dataset.chosenTheme || read("page.theme") || "auto";
    document.documentElement.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
  };
  dark.addEventListener("change", apply);
  document.addEventListener("themechange", apply);
  apply();
})();
