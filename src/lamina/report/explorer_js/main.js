/* What people do, and what then changes on the page. */

let waiting = 0;

/* One line for screen readers, once things are still. */
function say(words) {
  clearTimeout(waiting);
  waiting = setTimeout(() => { $("live").textContent = words; }, 300);
}

/* Everything that hangs on the choice. */
function update(told) {
  paint();
  drawTotals();
  drawSite();
  drawSolved();
  drawFrontier();
  $("undo").disabled = !state.past.length;
  $("reset").disabled = same(state.picks, PLAN);
  if ($("yaml").open) $("yaml-text").textContent = planText();
  if ($("table").open) drawTable();
  const total = sums(state.picks), r = state.resource;
  say(`${told ? told + ". " : ""}${D.priced ? `Predicted damage ${nats(total.damage)}; ` : ""}${percent(1 - total.saved[r] / R[r].whole)} of the ${R[r].label} kept.`);
}

function drawTotals() {
  const now = sums(state.picks), plan = sums(PLAN), body = $("totals");
  const rows = [];
  if (D.priced) rows.push(["Predicted damage, nats", "0", significant(now.damage), null, D.plan.length ? significant(plan.damage) : ""]);
  R.forEach((r, n) => {
    const left = r.whole - now.saved[n], share = left / r.whole;
    rows.push([r.label, amount(r.whole, r.key), amount(left, r.key), share, D.plan.length ? percent(1 - plan.saved[n] / r.whole) : ""]);
    if (r.key.startsWith("latency")) rows.push([r.label.replace("latency", "speed"), "×1", `×${fixed(1 / Math.max(share, 1e-9), 2)}`, null, D.plan.length ? `×${fixed(1 / Math.max(1e-9, 1 - plan.saved[n] / r.whole), 2)}` : ""]);
  });
  if (body.rows.length !== rows.length)
    body.replaceChildren(...rows.map(() => el("tr", {}, el("th", { scope: "row" }), el("td", { class: "n" }), el("td", { class: "n strong" }), el("td", { class: "n" }, el("span"), el("span", { class: "ex-left", "aria-hidden": "true" })), el("td", { class: "n" }))));
  rows.forEach(([label, whole, left, share, planned], n) => {
    const cells = body.rows[n].cells, [words, bar] = cells[3].children;
    [[cells[0], label], [cells[1], whole], [cells[2], left], [words, share === null ? "" : percent(share)], [cells[4], planned]].forEach(([at, told]) => { if (at.textContent !== told) at.textContent = told; });
    bar.style.setProperty("--left", share === null ? 0 : Math.max(0, share).toFixed(4));
    bar.hidden = share === null;
  });
}

/* The site that is looked at: its scores, its costs, its options. */
function drawSite() {
  const n = state.site, box = $("site"), key = `${n} ${state.resource} ${heldAt(n)} ${state.measure}`;
  if (box.shown !== key) {
    box.shown = key;
    $("site-name").textContent = siteName(n);
    $("site-scores").replaceChildren(...D.measures.filter((m) => m.v[n] !== null).map((m) => el("li", {}, `${m.name} `, el("b", {}, scoreText(n, m)))));
    const cost = D.cost[n];
    $("site-cost").textContent = cost ? `${amount(cost[0], "parameters")} parameters, ${amount(cost[1], "bytes")}, per token ${amount(cost[2], "macs")} multiply-adds and ${amount(cost[3], "bytes")} of KV cache` : "";
    $("options").replaceChildren(...optionRows(n));
    $("hold").checked = heldAt(n);
    $("hold").disabled = !OPTIONS[n].length;
  }
  for (const input of $("options").querySelectorAll("input")) input.checked = Number(input.value) === state.picks[n];
}

function optionRows(n) {
  if (!OPTIONS[n].length)
    return [el("p", { class: "note" }, MEMBERS[n].length ? "A block: Enter drops or keeps all its parts; choose other options part by part." : "Nothing on this page changes it.")];
  return [-1, ...OPTIONS[n]].map((i) => {
    const input = el("input", { type: "radio", name: "ex-option", value: i });
    if (heldAt(n)) input.disabled = true;
    const o = D.options[i], key = R[state.resource].key;
    const price = i < 0 ? "" : D.priced ? `+${nats(o.d)}` : "";
    const others = i >= 0 && o.g.length > 1 ? ` (with ${o.g.filter((g) => g !== n).map(siteName).join(", ")})` : "";
    const frees = i < 0 ? "" : o.s[state.resource] ? `${MINUS}${amount(o.s[state.resource], key)}` : "";
    return el("label", {}, input, el("span", {}, i < 0 ? "keep" : D.names[o.n] + others), el("span", { class: "n" }, price), el("span", { class: "n" }, frees));
  });
}

function drawSolved() {
  const box = $("bound"), s = state.solved, r = R[state.resource];
  const total = sums(state.picks), share = 1 - total.saved[state.resource] / r.whole;
  if (!s || s.r !== state.resource) {
    $("keep").value = Math.round(1000 * share);
    $("kept").textContent = `${percent(share)} kept: ${amount(r.whole * share, r.key)}`;
    box.textContent = "";
    return;
  }
  const gap = s.price - s.bound, all = s.price + s.base;
  $("kept").textContent = `at most ${percent(s.share)}: ${percent(share)} kept, ${amount(r.whole * share, r.key)}`;
  box.textContent = s.exact
    ? `Solved in ${fixed(s.ms, 0)} ms: no choice from these options within this budget is predicted to cost less (${nats(all)}).`
    : `Solved in ${fixed(s.ms, 0)} ms, not proven the cheapest: at most ${nats(gap)} (${percent(gap / Math.max(all, 1e-12))}) dearer than any choice from these options can be.`;
}

function focusSite(n) {
  state.site = n;
  paint();
  drawSite();
  if (CELLS[n]) CELLS[n].focus();
}

function act(n, edit) {
  state.site = n;
  const told = edit();
  update(told === false ? `${siteName(n)} is held or has no option` : cellText(n));
}

function listenChart() {
  const chart = $("chart"), tip = $("tip");
  const of = (e) => { const cell = e.target.closest("[data-n]"); return cell ? Number(cell.dataset.n) : null; };
  chart.addEventListener("click", (e) => { const n = of(e); if (n !== null) act(n, () => toggle(n)); });
  chart.addEventListener("keydown", (e) => {
    const n = of(e);
    if (n === null || e.ctrlKey || e.metaKey || e.altKey) return;
    const key = e.key.toLowerCase();
    const to = moved(e.key);
    if (to !== undefined) focusSite(to);
    else if (key === "n" || key === "p") act(n, () => step(n, key === "n" ? 1 : -1));
    else if (key === "h" && OPTIONS[n].length) hold(n, !heldAt(n));
    else if (!e.key.startsWith("Arrow")) return;
    e.preventDefault();
  });
  const show = (e) => {
    const n = of(e);
    tip.hidden = n === null;
    if (n === null) return;
    const m = D.measures[state.measure], i = state.picks[n], cell = CELLS[n].getBoundingClientRect(), box = $("app").getBoundingClientRect();
    tip.textContent = [siteName(n), m && `${m.name}: ${scoreText(n)}`, fateOf(n)[1] + (i >= 0 && D.priced ? `, +${nats(D.options[i].d)}` : "")].filter(Boolean).join("\n");
    tip.style.left = `${Math.max(0, Math.min(cell.left - box.left, box.width - 260))}px`;
    tip.style.top = `${cell.bottom - box.top + 6}px`;
  };
  chart.addEventListener("pointerover", show);
  chart.addEventListener("focusin", show);
  for (const out of ["pointerleave", "focusout"]) chart.addEventListener(out, () => { tip.hidden = true; });
}

function hold(n, on) {
  if (on) state.held.add(n); else state.held.delete(n);
  $("site").shown = "";
  update(`${siteName(n)} ${on ? "is held" : "may change"}`);
  limits();
}

/* The slider reaches as far as options do. */
function limits() {
  const r = state.resource;
  $("keep").min = Math.min(999, Math.ceil(1000 * (1 - reach(r) / R[r].whole)));
}

function slide() {
  const share = Number($("keep").value) / 1000;
  if (!solveFor(state.resource, share)) {
    $("bound").textContent = `No choice keeps only ${percent(share)} of the ${R[state.resource].label}.`;
    return;
  }
  update("");
}

function listenControls() {
  $("measure").addEventListener("change", (e) => { state.measure = Number(e.target.value); $("site").shown = ""; drawLegend(); update(""); });
  $("resource").addEventListener("change", (e) => { state.resource = Number(e.target.value); state.solved = null; $("site").shown = ""; limits(); update(""); });
  let due = 0;
  $("keep").addEventListener("input", () => { cancelAnimationFrame(due); due = requestAnimationFrame(slide); });
  $("options").addEventListener("change", (e) => { const i = Number(e.target.value), n = state.site; act(n, () => change(() => { clear(n); if (i >= 0) take(i); })); });
  $("hold").addEventListener("change", (e) => hold(state.site, e.target.checked));
  $("undo").addEventListener("click", () => { const last = state.past.pop(); if (last) { state.picks = last; state.solved = null; update("Undone"); } });
  $("reset").addEventListener("click", () => { change(() => { state.picks = PLAN.slice(); }); update("The run's plan"); });
  $("none").addEventListener("click", () => { change(() => { state.picks = state.picks.map((i, p) => (heldAt(p) ? i : -1)); }); update("Everything is kept"); });
  $("copy").addEventListener("click", copyPlan);
  $("download").addEventListener("click", downloadPlan);
  $("yaml").addEventListener("toggle", () => { if ($("yaml").open) $("yaml-text").textContent = planText(); });
  $("table").addEventListener("toggle", () => { if ($("table").open) drawTable(); });
  document.addEventListener("keydown", (e) => { if ((e.ctrlKey || e.metaKey) && e.key === "z" && !$("undo").disabled) { e.preventDefault(); $("undo").click(); } });
}

function start() {
  if (!D.measures.length) $("measure-box").hidden = true;
  D.measures.forEach((m, n) => $("measure").append(el("option", { value: n }, m.name + (m.unit ? ` (${m.unit})` : ""))));
  const scored = D.measures.map((m) => m.v.filter((v) => v !== null).length), asked = D.measures.findIndex((m) => m.name === D.shown);
  state.measure = asked >= 0 ? asked : Math.max(0, scored.indexOf(Math.max(...scored)));
  $("measure").value = state.measure;
  R.forEach((r, n) => $("resource").append(el("option", { value: n }, r.label)));
  $("resource").value = state.resource;
  $("inside-box").hidden = !D.inside.length;
  D.inside.forEach((m, n) => $("inside").append(el("option", { value: n }, `${m.kind.replaceAll("_", " ")}s: ${m.measure}`)));
  const able = D.priced && D.options.length > 0;
  $("budget").hidden = !able;
  $("frontier-figure").hidden = !able;
  for (const id of ["copy", "download"]) $(id).disabled = !D.head;
  state.picks = PLAN.slice();
  $("app").hidden = false;
  limits();
  drawLegend();
  drawChart();
  listenChart();
  listenInside();
  listenControls();
  update("");
  new ResizeObserver(() => { drawChart(); }).observe($("chart"));
  document.documentElement.addEventListener("recoloured", () => { if (units.map) drawInside(); });
  document.documentElement.dataset.ready = "true";
}
