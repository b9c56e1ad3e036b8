/* The page's data, the current choice, and what it comes to. */

const D = JSON.parse(document.getElementById("lamina-data").textContent);
const R = D.resources;
const PLACES = [...D.ids, ...D.extra];
const OPTIONS = PLACES.map(() => []);
D.options.forEach((o, i) => o.g.forEach((p) => OPTIONS[p].push(i)));
OPTIONS.forEach((list) => list.sort((a, b) => D.options[a].d - D.options[b].d));
const NUMBER = new Map(D.ids.map((id, n) => [id, n]));

/* The sublayers of each block that can be changed. */
const MEMBERS = D.ids.map((id, n) => (OPTIONS[n].length ? [] : PLACES.flatMap((other, m) => (other.startsWith(id + ".") && OPTIONS[m].length ? [m] : []))));

const state = {
  picks: new Array(PLACES.length).fill(-1),
  held: new Set(D.protect.filter((p) => OPTIONS[p].length)),
  resource: Math.max(0, R.findIndex((r) => r.key === D.asked)),
  measure: 0,
  site: Math.max(0, OPTIONS.findIndex((list) => list.length)),
  past: [],
  solved: null,
};

function picksOf(chosenOptions) {
  const picks = new Array(PLACES.length).fill(-1);
  for (const i of chosenOptions) for (const p of D.options[i].g) picks[p] = i;
  return picks;
}
const PLAN = picksOf(D.plan);

/* The options of a choice, each once, in depth order. */
function chosenOf(picks) {
  return picks.filter((i, p) => i >= 0 && D.options[i].g[0] === p);
}

function sums(picks) {
  const saved = R.map(() => 0);
  let damage = 0;
  for (const i of chosenOf(picks)) {
    damage += D.options[i].d;
    D.options[i].s.forEach((s, r) => { saved[r] += s; });
  }
  return { damage, saved };
}

function same(a, b) { return a.every((v, n) => v === b[n]); }

/* Change the choice: keep what was, for undo. */
function change(edit, solved) {
  const before = state.picks.slice();
  edit();
  state.solved = solved || null;
  if (same(before, state.picks)) return;
  state.past.push(before);
  if (state.past.length > 200) state.past.shift();
}

function clear(place) {
  const i = state.picks[place];
  if (i >= 0) for (const p of D.options[i].g) state.picks[p] = -1;
}

function take(i) {
  for (const p of D.options[i].g) clear(p);
  for (const p of D.options[i].g) state.picks[p] = i;
}

function isDrop(i) { return i >= 0 && D.names[D.options[i].n] === "drop"; }
function dropAt(place) { return OPTIONS[place].find(isDrop); }
function heldAt(place) { return state.held.has(place); }

/* Keep what is changed, else drop; without a drop, the option that saves most. A block: all its parts. */
function toggle(n) {
  const parts = MEMBERS[n].length ? MEMBERS[n] : [n];
  const free = parts.filter((p) => !heldAt(p) && OPTIONS[p].length);
  const undo = parts.length > 1 ? free.every((p) => isDrop(state.picks[p])) : state.picks[n] >= 0;
  change(() => free.forEach((p) => {
    clear(p);
    if (!undo) take(dropAt(p) ?? [...OPTIONS[p]].sort((a, b) => saves(b) - saves(a))[0]);
  }));
  return free.length > 0;
}

function saves(i) { return D.options[i].s[state.resource]; }

/* The next option of a place, dearer by one; behind the last comes keeping it. */
function step(place, by) {
  const list = [-1, ...OPTIONS[place]];
  if (heldAt(place) || list.length < 2) return;
  const at = (list.indexOf(state.picks[place]) + by + list.length) % list.length;
  change(() => { clear(place); if (list[at] >= 0) take(list[at]); });
}

/* How an option's places stand to those that are held: none of them may be changed. */
function fixedNow() {
  const places = new Set();
  for (const p of state.held) {
    places.add(p);
    if (state.picks[p] >= 0) D.options[state.picks[p]].g.forEach((g) => places.add(g));
  }
  const without = new Set(), saved = R.map(() => 0), kept = new Set();
  for (const p of places) {
    OPTIONS[p].forEach((i) => without.add(i));
    if (state.picks[p] >= 0) kept.add(state.picks[p]);
  }
  let damage = 0;
  for (const i of kept) { damage += D.options[i].d; D.options[i].s.forEach((s, r) => { saved[r] += s; }); }
  return { without, saved, damage, kept: [...kept] };
}

function listed(r) { return D.options.map((o) => ({ d: o.d, s: o.s[r], g: o.g })); }

/* The most that can go of a resource. */
function reach(r) {
  const fixed = fixedNow(), best = new Map();
  D.options.forEach((o, i) => {
    if (!fixed.without.has(i)) for (const g of o.g) best.set(g, Math.max(best.get(g) || 0, o.s[r] / o.g.length));
  });
  let sum = fixed.saved[r];
  for (const v of best.values()) sum += v;
  return Math.min(sum, R[r].whole);
}

/* Choose anew for a share that stays of a resource; false where no choice reaches it. */
function solveFor(r, share) {
  const began = performance.now(), fixed = fixedNow();
  const need = R[r].whole * (1 - share) - fixed.saved[r];
  const found = chosen(listed(r), need, D.sets, fixed.without);
  if (!found) return false;
  const picks = picksOf([...fixed.kept, ...found.chosen]);
  change(() => { state.picks = picks; }, { ...found, share, r, ms: performance.now() - began, base: fixed.damage });
  return true;
}
