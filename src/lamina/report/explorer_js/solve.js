/* A multiple-choice knapsack under one budget, with a bound that holds.

   cheapest(options, need, fixed): options are {d: price, s: what it saves, g: places}. Of options that share a place at
   most one is taken; the sum of s must reach `need`. Returns {chosen, price, bound, exact} or null where nothing does:
   no choice at all costs less than `bound`, and with `exact` none costs less than `price`. */

const STATES = 8000;   /* partial choices that are kept at most */
const PACKS = 400;      /* choices of places that hang together that are listed at most */
const SETS = 600;       /* sets of places that are told apart there at most */

/* Places that options join hang together; each such set is one class with all that can be chosen inside it. */
function classesOf(options, usable) {
  const parent = new Map();
  const find = (p) => { while (parent.get(p) !== p) { parent.set(p, parent.get(parent.get(p))); p = parent.get(p); } return p; };
  for (const o of options) for (const g of o.g) if (!parent.has(g)) parent.set(g, g);
  usable.forEach((i) => { const [first, ...more] = options[i].g; for (const g of more) parent.set(find(g), find(first)); });
  const members = new Map();
  for (const i of usable) {
    const root = find(options[i].g[0]);
    if (!members.has(root)) members.set(root, []);
    members.get(root).push(i);
  }
  return [...members.values()].map((list) => classOf(options, list));
}

/* {items: [{d, s, of}] or null, whole: whether every choice that is not beaten is among them, members, places} */
function classOf(options, members) {
  const places = [...new Set(members.flatMap((i) => options[i].g))].sort((a, b) => a - b);
  let whole = true;
  const items = packs(options, members, places, (list) => {
    const kept = front(list);
    if (kept.length <= PACKS) return kept;
    whole = false;
    return hull(kept);
  });
  return { items, whole: whole && items !== null, members, places };
}

/* Choices of disjoint places, place by place; of those that leave the same places free, what `reduce` keeps. Null where
   too many sets of places must be told apart. */
function packs(options, members, places, reduce) {
  const at = new Map(places.map((p) => [p, []]));
  for (const i of members) at.get(Math.min(...options[i].g)).push(i);
  let states = new Map([["", [{ d: 0, s: 0, of: [], used: [] }]]]);
  for (const p of places) {
    const next = new Map();
    const add = (used, st) => {
      const key = used.join();
      if (!next.has(key)) next.set(key, []);
      next.get(key).push(st);
    };
    for (const list of states.values()) for (const st of list) {
      const left = st.used.filter((g) => g !== p);
      add(left, { ...st, used: left });
      if (left.length < st.used.length) continue;
      for (const i of at.get(p)) {
        const o = options[i];
        if (o.g.some((g) => left.includes(g))) continue;
        const used = [...left, ...o.g.filter((g) => g !== p)].sort((a, b) => a - b);
        add(used, { d: st.d + o.d, s: st.s + o.s, of: [...st.of, i], used });
      }
    }
    if (next.size > SETS) return null;
    states = new Map([...next].map(([key, list]) => [key, reduce(list)]));
  }
  return states.get("");
}

/* What no other beats in both price and saving, by rising saving. */
function front(items) {
  const sorted = [...items].sort((a, b) => b.s - a.s || a.d - b.d), kept = [];
  let least = Infinity;
  for (const it of sorted) if (it.d < least) { kept.push(it); least = it.d; }
  return kept.reverse();
}

/* The lower convex hull of a front: steps of rising price per unit saved. */
function hull(items) {
  const kept = [];
  for (const it of items) {
    while (kept.length > 1) {
      const a = kept[kept.length - 2], b = kept[kept.length - 1];
      if ((b.d - a.d) * (it.s - b.s) < (it.d - b.d) * (b.s - a.s)) break;
      kept.pop();
    }
    kept.push(it);
  }
  return kept;
}

/* Where places hang together too widely to list all choices: single options of disjoint places, the best rates first. */
function narrowed(options, cls, rate) {
  const order = [...cls.members].sort((a, b) => value(options[b], rate) / options[b].g.length - value(options[a], rate) / options[a].g.length);
  const used = new Set(), groups = new Map();
  for (const i of order) {
    if (options[i].g.length === 1 || value(options[i], rate) <= 0 || options[i].g.some((g) => used.has(g))) continue;
    for (const g of options[i].g) used.add(g);
    groups.set(i, [i]);
  }
  const taken = new Map();
  for (const i of cls.members) if (options[i].g.length === 1 && !used.has(options[i].g[0])) {
    const at = options[i].g[0];
    if (!taken.has(at)) taken.set(at, []);
    taken.get(at).push(i);
  }
  return [...groups.values(), ...taken.values()].map((list) => classOf(options, list));
}

function value(o, rate) { return rate * o.s - o.d; }

/* What a class is worth at a rate, at most: its best choice; where its places hang together too widely, each option's
   worth is shared out evenly to its places, of which each counts its best. */
function worth(options, cls, rate) {
  if (cls.whole) { let best = 0; for (const it of cls.items) best = Math.max(best, rate * it.s - it.d); return best; }
  if (cls.items) {
    const top = packs(options, cls.members, cls.places, (list) => [list.reduce((a, b) => (value(b, rate) > value(a, rate) ? b : a))]);
    return Math.max(...top.map((it) => value(it, rate)), 0);
  }
  const best = new Map();
  for (const i of cls.members) for (const g of options[i].g)
    best.set(g, Math.max(best.get(g) || 0, value(options[i], rate) / options[i].g.length));
  let sum = 0;
  for (const v of best.values()) sum += v;
  return sum;
}

function dual(options, classes, rate, need) {
  let sum = rate * need;
  for (const c of classes) sum -= worth(options, c, rate);
  return sum;
}

function cheapest(options, need, without) {
  const out = without || new Set(), usable = [];
  options.forEach((_, i) => { if (!out.has(i)) usable.push(i); });
  const all = classesOf(options, usable);
  const wide = all.some((c) => !c.items) ? steepest(options, all, need) : 0;
  const classes = all.flatMap((c) => (c.items ? [c] : narrowed(options, c, wide)));
  const start = greedy(classes, need);
  if (!start) return null;
  const bound = Math.max(...[start.rate, wide].map((r) => dual(options, all, r, need)));
  const better = repaired(classes, need, start);
  const chosen = better.items.flatMap((it) => it.of).sort((a, b) => a - b);
  const price = chosen.reduce((sum, i) => sum + options[i].d, 0);
  const exact = better.complete && all.every((c) => c.whole);
  return { chosen, price, bound: exact ? price : Math.min(bound, price), exact };
}

/* The rate of the best bound, by golden section: the bound is concave in it. */
function steepest(options, classes, need) {
  let low = 0, high = 0;
  for (const c of classes) for (const i of c.members) if (options[i].s > 0) high = Math.max(high, options[i].d / options[i].s);
  high = 2 * high + 1e-12;
  const share = (Math.sqrt(5) - 1) / 2;
  for (let n = 0; n < 60; n++) {
    const a = high - share * (high - low), b = low + share * (high - low);
    if (dual(options, classes, a, need) < dual(options, classes, b, need)) low = a; else high = b;
  }
  return (low + high) / 2;
}

/* Steps along the hulls by rising price per unit until the need is met. */
function greedy(classes, need) {
  const steps = [], at = classes.map(() => 0), hulls = classes.map((c) => hull(c.items));
  let saved = 0;
  hulls.forEach((h, c) => {
    saved += h[0].s;
    for (let n = 1; n < h.length; n++) steps.push({ c, n, rate: (h[n].d - h[n - 1].d) / (h[n].s - h[n - 1].s), s: h[n].s - h[n - 1].s });
  });
  steps.sort((a, b) => a.rate - b.rate);
  let rate = 0;
  for (const step of steps) {
    if (saved >= need && step.rate >= 0) break;
    at[step.c] = step.n;
    saved += step.s;
    rate = Math.max(step.rate, 0);
  }
  return saved >= need ? { items: at.map((n, c) => hulls[c][n]), rate, saved } : null;
}

/* Of all choices the cheapest: a dynamic programme over what the bound does not rule out. An item's loss is what it
   costs beyond the best of its class at the rate; a choice costs the bound, its losses, and the rate times what it
   saves too much. complete: nothing was left out for want of room. */
function repaired(classes, need, start) {
  const { rate } = start;
  const tops = classes.map((c) => c.items.reduce((best, it) => Math.max(best, rate * it.s - it.d), -Infinity));
  const base = rate * need - tops.reduce((a, b) => a + b, 0);
  let best = { price: start.items.reduce((sum, it) => sum + it.d, 0), items: start.items };
  let complete = true;
  const spare = () => best.price - base + 1e-12 * (Math.abs(best.price) + 1e-300);
  const loss = (c, it) => tops[c] - (rate * it.s - it.d);
  const order = classes.map((_, c) => c).sort((a, b) => second(classes[a], a, loss) - second(classes[b], b, loss));
  const rest = new Array(order.length + 1).fill(0);
  for (let n = order.length - 1; n >= 0; n--)
    rest[n] = rest[n + 1] + classes[order[n]].items.reduce((m, it) => (loss(order[n], it) <= spare() ? Math.max(m, it.s) : m), 0);
  let states = [{ s: 0, l: 0, it: null, from: null }];
  for (let n = 0; n < order.length; n++) {
    const c = order[n], items = classes[c].items.filter((it) => loss(c, it) <= spare());
    const next = [];
    for (const it of items) {
      const more = loss(c, it);
      for (const st of states) {
        const l = st.l + more, s = st.s + it.s;
        if (l <= spare() && s + rest[n + 1] >= need) next.push({ s, l, it, from: st });
      }
    }
    /* price so far is l + rate·s + constant: more saved at no higher price is better */
    next.sort((a, b) => b.s - a.s || a.l - b.l);
    states = [];
    let least = Infinity;
    for (const st of next) { const p = st.l + rate * st.s; if (p < least) { states.push(st); least = p; } }
    if (states.length > STATES) {
      complete = false;
      states.sort((a, b) => a.l - b.l).length = STATES;
    }
  }
  for (const st of states) if (st.s >= need) {
    const price = base + st.l + rate * (st.s - need);
    if (price < best.price - 1e-15) {
      const items = new Array(classes.length);
      for (let n = order.length - 1, here = st; n >= 0; n--, here = here.from) items[order[n]] = here.it;
      best = { price, items };
    }
  }
  return { ...best, complete };
}

function second(cls, c, loss) {
  const sorted = cls.items.map((it) => loss(c, it)).sort((a, b) => a - b);
  return sorted.length > 1 ? sorted[1] : Infinity;
}

/* The same where of each set of options one must stay out: the dearest few to take are tried without. */
function chosen(options, need, sets, without) {
  const first = cheapest(options, need, without);
  if (!first) return null;
  const whole = sets.find((set) => set.length && set.every((i) => first.chosen.includes(i)));
  if (!whole) return first;
  let best = null;
  const order = [...whole].sort((a, b) => options[b].d - options[a].d).slice(0, 3);
  for (const i of order) {
    const found = chosen(options, need, sets, new Set([...(without || []), i]));
    if (found && (!best || found.price < best.price)) best = found;
  }
  return best && { ...best, bound: Math.min(first.bound, best.price), exact: false };
}

/* Plans along the hulls, each the cheapest for what it saves: [{s, d}] by rising saving. */
function frontier(options, without, most) {
  const usable = options.map((_, i) => i).filter((i) => !(without && without.has(i)));
  const classes = classesOf(options, usable).flatMap((c) => (c.items ? [c] : narrowed(options, c, Infinity)));
  const steps = classes.flatMap((c) => {
    const h = hull(c.items);
    return h.slice(1).map((it, n) => ({ d: it.d - h[n].d, s: it.s - h[n].s }));
  }).sort((a, b) => a.d / a.s - b.d / b.s);
  const points = [{ s: 0, d: 0 }];
  for (const st of steps) { const last = points[points.length - 1]; points.push({ s: last.s + st.s, d: last.d + st.d }); }
  const every = Math.max(1, Math.ceil(points.length / most));
  return points.filter((_, n) => n % every === 0 || n === points.length - 1);
}
