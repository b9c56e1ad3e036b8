/* The depth chart: a grid of cells, one per block and sublayer, wrapped to the width of the page. */

const CELLS = new Array(D.ids.length).fill(null);
const ROWS_AT = new Map();   /* stack, row, block → site */
D.at.forEach(([s, b, r], n) => ROWS_AT.set(`${s} ${r} ${b}`, n));
const DEPTHS = D.stacks.map((_, s) => 1 + Math.max(...D.at.filter((a) => a[0] === s).map((a) => a[1])));
let perLine = 0;

function drawChart() {
  const chart = $("chart"), room = Math.max(280, chart.clientWidth || 960) - 84;
  const most = Math.max(6, Math.floor(room / 23));
  if (most === perLine && chart.firstChild) return;
  perLine = most;
  chart.replaceChildren();
  D.stacks.forEach((name, s) => {
    const depth = DEPTHS[s], lines = Math.ceil(depth / most), wide = Math.ceil(depth / lines);
    const rows = D.rows.map((_, r) => r).filter((r) => D.at.some((a) => a[0] === s && a[2] === r));
    if (name) chart.append(el("p", { class: "stack", id: `ex-stack-${s}` }, name));
    const grid = el("div", { role: "grid", "aria-label": `${name ? name + ", " : ""}${depth} blocks; arrow keys move, Enter drops or keeps, N and P change the option`, "aria-colcount": depth });
    for (let first = 0; first < depth; first += wide) {
      const last = Math.min(first + wide, depth);
      const line = el("div", { class: "ex-line", role: "presentation", style: `grid-template-columns:76px repeat(${wide},minmax(0,1fr))` });
      line.append(el("span", { "aria-hidden": "true" }));
      for (let b = first; b < first + wide; b++)
        line.append(el("span", { class: "ex-tick", "aria-hidden": "true" }, b < last ? (wide <= 24 || b % 2 === 0 ? String(b) : "") : ""));
      for (const r of rows) line.append(rowOf(s, r, first, last, wide));
      grid.append(line);
    }
    chart.append(grid);
  });
  paint();
}

function rowOf(s, r, first, last, wide) {
  const row = el("div", { class: "ex-row", role: "row" }, el("span", { class: "ex-head", role: "rowheader" }, D.rows[r]));
  for (let b = first; b < first + wide; b++) {
    const n = b < last ? ROWS_AT.get(`${s} ${r} ${b}`) : undefined;
    if (n === undefined) { row.append(el("span", { role: "presentation" })); continue; }
    CELLS[n] = el("button", { type: "button", role: "gridcell", tabindex: "-1", "data-n": n, "aria-colindex": b + 1 });
    CELLS[n].shown = "";
    row.append(CELLS[n]);
  }
  return row;
}

/* What is chosen at a cell: [class, words, share of it that stays]. */
function fateOf(n) {
  const parts = MEMBERS[n];
  if (parts.length) {
    const gone = parts.filter((p) => isDrop(state.picks[p])).length, touched = parts.filter((p) => state.picks[p] >= 0).length;
    if (gone === parts.length) return ["drop", "all of it dropped", 0];
    return touched ? ["part", `${touched} of ${parts.length} parts changed`, 1] : ["", "kept", 1];
  }
  const i = state.picks[n];
  if (i < 0) return OPTIONS[n].length ? ["", heldAt(n) ? "kept, held" : "kept", 1] : ["", "can't be changed here", 1];
  if (isDrop(i)) return ["drop", "dropped", 0];
  const cost = D.cost[n], r = Math.max(0, R.findIndex((x) => x.key === "bytes"));
  return ["change", D.names[D.options[i].n], cost && cost[1] ? Math.max(0, 1 - D.options[i].s[r] / cost[1]) : 0.5];
}

function scoreText(n, m = D.measures[state.measure]) {
  if (!m || m.v[n] === null) return "not scored";
  return `${significant(m.v[n])}${m.e[n] === null ? "" : ` ± ${significant(m.e[n], 2)}`}${m.unit ? " " + m.unit : ""}`;
}

function cellText(n) {
  const m = D.measures[state.measure];
  return `${siteName(n)}: ${m ? `${m.name} ${scoreText(n)}, ` : ""}${fateOf(n)[1]}`;
}

/* Colours and marks of all cells; only what differs is written. */
function paint() {
  const m = D.measures[state.measure];
  for (let n = 0; n < CELLS.length; n++) {
    const cell = CELLS[n];
    if (!cell) continue;
    const [fate, , left] = fateOf(n), parts = MEMBERS[n].length ? MEMBERS[n] : [n];
    const differs = parts.some((p) => state.picks[p] !== PLAN[p]);
    const shade = m && m.v[n] !== null ? `q${level(m, m.v[n])}` : "none";
    const style = `ex-cell ${shade} ${fate}${differs ? " differs" : ""}${parts.every(heldAt) ? " held" : ""}${n === state.site ? " here" : ""}`;
    const told = cellText(n), mark = style + told + left;
    if (mark === cell.shown) continue;
    cell.shown = mark;
    cell.className = style;
    cell.setAttribute("aria-label", told);
    cell.setAttribute("aria-selected", String(n === state.site));
    cell.style.setProperty("--left", left.toFixed(3));
    cell.tabIndex = n === state.site ? 0 : -1;
  }
}

/* Arrow keys: along the depth, and between the parts of a block. */
function moved(key) {
  const [s, b, r] = D.at[state.site];
  const find = (block, row) => ROWS_AT.get(`${s} ${row} ${block}`);
  const seek = (from, by, make) => {
    for (let at = from + by; at >= 0 && at < Math.max(DEPTHS[s], D.rows.length); at += by) { const n = make(at); if (n !== undefined) return n; }
    return undefined;
  };
  if (key === "ArrowRight") return seek(b, 1, (x) => find(x, r));
  if (key === "ArrowLeft") return seek(b, -1, (x) => find(x, r));
  if (key === "ArrowDown") return seek(r, 1, (x) => find(b, x));
  if (key === "ArrowUp") return seek(r, -1, (x) => find(b, x));
  if (key === "Home") return seek(-1, 1, (x) => find(x, r));
  if (key === "End") return seek(DEPTHS[s], -1, (x) => find(x, r));
  return undefined;
}

function drawLegend() {
  const m = D.measures[state.measure], box = $("legend");
  box.replaceChildren();
  if (!m) return;
  const bar = el("span", { class: "ex-bar", role: "img", "aria-label": `Colours from ${significant(m.low)} to ${significant(m.high)} ${m.unit}, ${m.how}` });
  for (let n = 0; n < LEVELS; n++) bar.append(el("i", { class: `q${n}` }));
  const ends = el("span", { class: "ex-ends", "aria-hidden": "true" }, ...[0, 0.5, 1].map((at) => el("span", {}, significant(valueAt(m, at), 2))));
  box.append(el("span", { class: "ex-scale" }, bar, ends), el("span", { class: "unit" }, [m.unit && `in ${m.unit}`, m.how !== "linear" && `${m.how} scale`].filter(Boolean).join(", ")));
}

/* A text table of the chart, made when it is first opened. */
function drawTable() {
  const m = D.measures[state.measure], body = el("tbody");
  D.ids.forEach((id, n) => body.append(el("tr", {}, el("th", { scope: "row" }, el("code", {}, id)), el("td", { class: "n" }, m ? scoreText(n) : ""), el("td", {}, fateOf(n)[1]))));
  const head = el("thead", {}, el("tr", {}, ...["site", m ? m.name : "", "choice"].map((h) => el("th", { scope: "col" }, h))));
  $("table-body").replaceChildren(el("table", {}, head, body));
}
