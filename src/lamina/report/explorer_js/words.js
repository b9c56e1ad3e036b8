/* Numbers as people read them, as in the rest of the report. */

const NBSP = "\u00a0", MINUS = "\u2212";

function fixed(value, digits) {
  let text = Math.abs(value).toFixed(digits);
  const sign = value < 0 && Number(text) !== 0 ? MINUS : "";
  const [whole, rest] = text.split(".");
  return sign + whole.replace(/\B(?=(\d{3})+(?!\d))/g, NBSP) + (rest ? "." + rest : "");
}

function significant(value, digits = 3) {
  if (!value || !Number.isFinite(value)) return value ? String(value) : "0";
  const power = Math.floor(Math.log10(Math.abs(value)));
  if (power >= -4 && power < 6) return fixed(value, Math.max(0, digits - 1 - power));
  const [mantissa, e] = value.toExponential(digits - 1).split("e");
  return `${mantissa}e${Number(e)}`.replaceAll("-", MINUS);
}

function scaled(value, unit, names) {
  let size = Math.abs(value), power = 0;
  while (size >= 999.95 && power < names.length - 1) { size /= 1000; power += 1; }
  const whole = String(Math.trunc(size)).length;
  const text = power ? fixed(Math.sign(value) * size, Math.max(0, Math.min(2, 4 - whole))) : fixed(value, 0);
  return names[power] + unit ? `${text}${NBSP}${names[power]}${unit}` : text;
}

function amount(value, key) {
  if (key.startsWith("latency")) return `${significant(1000 * value)}${NBSP}ms`;
  return key.includes("bytes") ? scaled(value, "B", ["", "k", "M", "G", "T"]) : scaled(value, "", ["", "k", "M", key === "macs" ? "G" : "B", "T"]);
}

function percent(share, digits = 1) { return `${fixed(100 * share, digits)}${NBSP}%`; }
function nats(value) { return `${significant(value)}${NBSP}nats`; }

/* A site in words: block 7, attention. */
function siteName(n) { return PLACES[n].replace(/^(?:(.+)\.)?block\.(\d+)(?:\.(.+))?$/, (_, stack, block, kind) => (stack ? stack + " " : "") + "block " + block + (kind ? " " + kind.replaceAll("_", " ") : "")); }

/* Scores → 0 … 1, as in svg.py. */
function placeOn(scale, value) {
  const bend = (v) => (scale.how === "log" ? Math.log(Math.max(v, 1e-300)) : scale.how === "signed log" ? Math.asinh(v / scale.bend) : v);
  const low = bend(scale.low), high = bend(scale.high);
  return high <= low ? 0.5 : Math.min(1, Math.max(0, (bend(value) - low) / (high - low)));
}
function valueAt(scale, at) {
  const bend = (v) => (scale.how === "log" ? Math.log(v) : scale.how === "signed log" ? Math.asinh(v / scale.bend) : v);
  const here = bend(scale.low) + (bend(scale.high) - bend(scale.low)) * at;
  return scale.how === "log" ? Math.exp(here) : scale.how === "signed log" ? Math.sinh(here) * scale.bend : here;
}
const LEVELS = 24;
function level(scale, value) { return Math.round(placeOn(scale, value) * (LEVELS - 1)); }

/* Elements. */
function el(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text", "rect", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}
const $ = (id) => document.getElementById("ex-" + id);
