/* The cheapest plans for ever smaller budgets, the run's plan, and the current choice. */

const bend = { key: "", points: [], at: null };

function frontierPoints() {
  const r = state.resource, fixed = fixedNow();
  const base = fixed.saved[r], points = frontier(listed(r), fixed.without, 160);
  return points.map((p) => [1 - (p.s + base) / R[r].whole, p.d + fixed.damage]);
}

function drawFrontier() {
  const svg = $("frontier");
  if (!D.priced || !D.options.length) return;
  const key = `${state.resource} ${[...state.held].map((p) => `${p}:${state.picks[p]}`).join()}`;
  if (key !== bend.key) {
    bend.key = key;
    bend.points = frontierPoints();
    axes(svg);
  }
  const total = sums(state.picks), share = 1 - total.saved[state.resource] / R[state.resource].whole;
  const [x, y] = bend.at(share, total.damage);
  const here = svg.querySelector(".ex-now");
  here.setAttribute("cx", x.toFixed(1));
  here.setAttribute("cy", y.toFixed(1));
  here.firstChild.textContent = `the current choice: ${percent(share)} kept, ${nats(total.damage)}`;
  svg.setAttribute("aria-label", `Predicted damage against what is kept of the ${R[state.resource].label}; the current choice keeps ${percent(share)} at ${nats(total.damage)}`);
}

function axes(svg) {
  const W = 520, H = 280, left = 58, right = W - 14, top = 26, bottom = H - 40, r = state.resource;
  const plan = sums(PLAN), planned = [1 - plan.saved[r] / R[r].whole, plan.damage];
  const damages = [...bend.points.map((p) => p[1]), planned[1]].filter((d) => d > 0);
  const low = Math.floor(Math.log10(Math.max(1e-5, Math.min(...damages)))), high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...damages, 1e-4))));
  const least = Math.max(0, Math.min(...bend.points.map((p) => p[0])) - 0.03);
  bend.at = (share, damage) => {
    const power = Math.min(high + 0.2, Math.max(low, Math.log10(Math.max(damage, 1e-300))));
    return [left + (right - left) * (1 - Math.max(least, share)) / (1 - least), bottom - (bottom - top) * (power - low) / (high - low)];
  };
  const parts = [];
  for (let p = low; p <= high; p++) {
    const y = bend.at(1, 10 ** p)[1];
    parts.push(el("line", { x1: left, x2: right, y1: y, y2: y, class: "grid" }), label(left - 7, y + 4, significant(10 ** p, 1), "end"));
  }
  const gap = 1 - least > 0.6 ? 0.2 : 1 - least > 0.25 ? 0.1 : 0.05;
  for (let share = 1; share >= least - 1e-9; share -= gap) {
    const x = bend.at(share, 1)[0];
    parts.push(el("line", { x1: x, x2: x, y1: bottom, y2: bottom + 4, class: "grid" }), label(x, bottom + 17, `${Math.round(100 * share)} %`, "middle"));
  }
  parts.push(label((left + right) / 2, H - 6, `${R[r].label} kept`, "middle"), label(left, 14, "predicted rise of the loss, nats per token", "start"));
  const path = bend.points.map(([s, d], n) => { const [x, y] = bend.at(s, d); return `${n ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`; }).join("");
  parts.push(el("path", { d: path, class: "track" }));
  for (const [s, d] of bend.points) {
    const [x, y] = bend.at(s, d), dot = el("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: 2, class: "ex-point" });
    parts.push(dot);
  }
  if (D.plan.length) {
    const [x, y] = bend.at(...planned);
    parts.push(el("path", { d: `M${x - 6},${y}L${x},${y - 6}L${x + 6},${y}L${x},${y + 6}Z`, class: "ex-plan" }, el("title", {}, `the run's plan: ${percent(planned[0])} kept, ${nats(planned[1])}`)));
    parts.push(label(x + 9, y - 7, "the run's plan", "start", " ex-halo"));
  }
  parts.push(el("circle", { r: 5.5, class: "ex-now" }, el("title")));
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.replaceChildren(...parts);
}

function label(x, y, words, anchor, more = "") {
  return el("text", { x: x.toFixed(1), y: y.toFixed(1), class: `tick${more}`, "text-anchor": anchor }, words);
}
