/* Heads, KV groups, experts, neurons: one canvas, drawn when it is asked for. */

const units = { map: null, cursor: [0, 0], cells: [] };

function shade(n) { return palette()[n]; }
function palette() { return D.palette[isDark() ? "dark" : "light"]; }

function drawInside() {
  const pick = $("inside").value, figure = $("inside-figure");
  units.map = pick === "" ? null : D.inside[Number(pick)];
  figure.hidden = !units.map;
  if (!units.map) return;
  const map = units.map, sites = Object.keys(map.v).map(Number).sort((a, b) => a - b);
  const most = Math.max(...sites.map((n) => map.v[n].length));
  const canvas = $("units"), wide = Math.max(280, figure.clientWidth || 960);
  const w = Math.max(2, Math.min(26, Math.floor(wide / sites.length))), h = Math.max(2, Math.min(16, Math.floor(420 / most)));
  const dots = window.devicePixelRatio || 1;
  canvas.width = Math.round(w * sites.length * dots);
  canvas.height = Math.round(h * most * dots);
  canvas.style.width = `${w * sites.length}px`;
  canvas.style.height = `${h * most}px`;
  const pen = canvas.getContext("2d"), colours = palette(), gap = w > 5 ? 1 : 0;
  pen.setTransform(dots, 0, 0, dots, 0, 0);
  sites.forEach((n, x) => map.v[n].forEach((v, y) => {
    if (v === null) return;
    pen.fillStyle = colours[level(map, v)];
    pen.fillRect(x * w, y * h, w - gap, h - (h > 5 ? 1 : 0));
  }));
  Object.assign(units, { sites, w, h, most });
  const noun = map.grouped ? `groups of ${map.kind.replaceAll("_", " ")}s of like score, the lowest above` : `${map.kind.replaceAll("_", " ")}s, the first above`;
  $("inside-words").textContent = `${map.measure}: ${sites.length} sublayers from left to right, ${noun}. From ${significant(map.low)} (faint) to ${significant(map.high)}${map.how === "linear" ? "" : `, ${map.how} scale`}.`;
  canvas.setAttribute("aria-label", `${map.measure} of ${map.kind}s; arrow keys move`);
  $("units-table").open = false;
  tellUnit(0, 0);
}

function tellUnit(x, y) {
  const { map, sites } = units;
  if (!map) return;
  x = Math.min(Math.max(x, 0), sites.length - 1);
  y = Math.min(Math.max(y, 0), map.v[sites[x]].length - 1);
  units.cursor = [x, y];
  const v = map.v[sites[x]][y], unit = map.grouped ? `${map.kind}s, group ${y + 1} of ${map.v[sites[x]].length}` : `${map.kind.replaceAll("_", " ")} ${y}`;
  $("unit-words").textContent = `${siteName(sites[x])}, ${unit}: ${v === null ? "not scored" : significant(v)}`;
}

function drawUnitsTable() {
  const { map, sites } = units, body = el("tbody");
  for (const n of sites) {
    const ranked = map.v[n].map((v, u) => [v, u]).filter(([v]) => v !== null).sort((a, b) => a[0] - b[0]);
    const low = ranked.slice(0, 3).map(([v, u]) => `${u}: ${significant(v)}`).join(", "), high = ranked[ranked.length - 1];
    body.append(el("tr", {}, el("th", { scope: "row" }, el("code", {}, D.ids[n])), el("td", {}, low), el("td", {}, high ? `${high[1]}: ${significant(high[0])}` : "")));
  }
  const noun = map.grouped ? "group" : map.kind.replaceAll("_", " ");
  $("units-body").replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...["sublayer", `lowest three (${noun}: score)`, "highest"].map((t) => el("th", { scope: "col" }, t)))), body));
}

function listenInside() {
  $("inside").addEventListener("change", drawInside);
  const canvas = $("units");
  canvas.addEventListener("pointermove", (e) => {
    const box = canvas.getBoundingClientRect();
    tellUnit(Math.floor((e.clientX - box.left) / units.w), Math.floor((e.clientY - box.top) / units.h));
  });
  canvas.addEventListener("click", () => { if (units.map) { focusSite(units.sites[units.cursor[0]]); } });
  canvas.addEventListener("keydown", (e) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
    if (!by) return;
    e.preventDefault();
    tellUnit(units.cursor[0] + by[0], units.cursor[1] + by[1]);
  });
  $("units-table").addEventListener("toggle", () => { if ($("units-table").open) drawUnitsTable(); });
}
