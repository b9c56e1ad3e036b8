/* Light or dark: the system's choice, until the button says otherwise. */

function isDark() {
  const asked = document.documentElement.dataset.theme;
  return asked ? asked === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function listenTheme() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const tell = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`); };
  const redraw = () => { tell(); root.dispatchEvent(new Event("recoloured")); };
  try { const kept = localStorage.getItem("lamina-theme"); if (kept === "dark" || kept === "light") root.dataset.theme = kept; } catch { /* no storage here */ }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("lamina-theme", root.dataset.theme); } catch { /* no storage here */ }
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  tell();
}
listenTheme();
