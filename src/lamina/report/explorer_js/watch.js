/* The state of a run as the server tells it. */

const at = (id) => document.getElementById(id);
let shownReport = "", lastLog = "", latest = null;

function duration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "";
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function showVerbs(verbs) {
  const list = at("verbs");
  list.replaceChildren(...verbs.map((v) => {
    const item = document.createElement("li"), told = document.createElement("span");
    item.className = v.state.replace(" ", "-");
    told.textContent = v.state === "at work" ? `at work for ${duration(Date.now() / 1000 - v.began)}` : `${v.state}${v.seconds === null ? "" : ` in ${duration(v.seconds)}`}`;
    item.append(v.name, told);
    return item;
  }));
}

function show(data) {
  latest = data;
  showVerbs(data.verbs);
  const now = data.now, bar = at("bar"), status = at("status");
  const words = now ? `${now.verb} is at work` : "no verb is at work";
  if (status.textContent !== words) status.textContent = words;
  at("what").textContent = now && now.what ? `${now.what}: ${now.done} of ${now.total}` : "\u00a0";
  if (now && now.total) { bar.max = now.total; bar.value = now.done; } else if (now) bar.removeAttribute("value"); else { bar.max = 1; bar.value = 0; }
  const text = data.log.join("\n");
  if (text !== lastLog) {
    const log = at("log"), below = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    lastLog = text;
    log.textContent = text;
    if (below) log.scrollTop = log.scrollHeight;
  }
  if (data.report && data.report !== shownReport) {
    shownReport = data.report;
    at("report").hidden = false;
    at("report-words").textContent = "as the folder stands; it is loaded anew when a verb has changed it";
    at("report").src = `/report.html?${data.report}`;
  }
}

const events = new EventSource("/events");
events.onmessage = (message) => show(JSON.parse(message.data));
events.onerror = () => { at("status").textContent = "the server is gone; waiting for it"; };
setInterval(() => { if (latest) showVerbs(latest.verbs); }, 1000);
