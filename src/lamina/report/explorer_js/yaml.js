/* The current choice as a plan file. */

function planNumber(x) {
  const text = String(x);
  return text.includes("e") && !text.includes(".") ? text.replace("e", ".0e") : text;
}

/* Units from a row of bits in base64. */
function unpacked(text) {
  const bits = atob(text), units = [];
  for (let n = 0; n < bits.length; n++) {
    const byte = bits.charCodeAt(n);
    for (let b = 0; b < 8; b++) if (byte & (1 << b)) units.push(8 * n + b);
  }
  return `[${units.join(", ")}]`;
}

function stepText(piece, place, why) {
  const id = JSON.stringify(place).slice(1, -1);
  const text = piece.replace(/\u0002([^\u0002]*)\u0002/g, (_, bits) => unpacked(bits)).replaceAll("\u0001", () => id);
  const reasons = Object.entries(why).filter(([, v]) => v !== null).map(([k, v]) => `${JSON.stringify(k)}: ${planNumber(v)}`);
  return `- {${text}${reasons.length ? `, why: {${reasons.join(", ")}}` : ""}}`;
}

function optionSteps(i) {
  const o = D.options[i];
  return o.p.map(([piece, price, told]) => {
    const saved = told || Object.fromEntries(R.map((r, n) => [r.key, o.s[n]]).filter(([, v]) => v));
    return stepText(D.pieces[piece], PLACES[o.g[0]], { ...(price === null ? {} : { damage: price }), ...saved });
  });
}

function budgetText(total) {
  if (same(state.picks, PLAN)) return D.head.budget;
  const r = state.resource, [metric, at] = R[r].key.split("@");
  const keep = Math.min(1, Math.max(1e-4, Math.ceil(1e4 * (1 - total.saved[r] / R[r].whole)) / 1e4));
  return `{"metric": "${metric}", "keep": ${planNumber(keep)}${at ? `, "at": "${at}"` : ""}, "protect": ${D.head.protect}}`;
}

function planText() {
  const total = sums(state.picks), mine = same(state.picks, PLAN);
  const steps = [...(mine ? D.other.map(([piece, why]) => stepText(piece, "", why)) : []), ...chosenOf(state.picks).flatMap(optionSteps)];
  const left = R.map((r, n) => [r.key, Number((r.whole - total.saved[n]).toPrecision(12))]).filter(([k]) => k.includes("@") || !D.partial);
  const loss = mine && D.expected !== null && D.expected !== undefined ? D.expected : D.priced ? Number(total.damage.toPrecision(6)) : null;
  const expects = [...(loss === null ? [] : [["loss", loss]]), ...left];
  return [
    "lamina: 1", `model: ${D.head.model}`, `recipe: ${D.head.recipe}`, `budget: ${budgetText(total)}`,
    ...(steps.length ? ["steps:", ...steps] : ["steps: []"]),
    `expects: {${expects.map(([k, v]) => `${JSON.stringify(k)}: ${planNumber(v)}`).join(", ")}}`, "",
  ].join("\n");
}

async function copyPlan() {
  const text = planText();
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say("The plan is copied.");
  $("exported").textContent = "Copied. Put it into the run folder as plan.yaml, then run lamina apply.";
}

function downloadPlan() {
  const link = el("a", { download: "plan.yaml", href: URL.createObjectURL(new Blob([planText()], { type: "application/yaml" })) });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  $("exported").textContent = "Saved as plan.yaml. Put it into the run folder, then run lamina apply.";
}
