// The dashboard: shows what /api/v1 says, and operates the relay by it. It keeps nothing but the figures of the last
// minutes, in this tab. What senders and receivers wrote gets into the page as text, never as markup.

const HISTORY = 300; // seconds that a chart shows
const AT_FIRST = 60; // … and that it has room for when it begins
const LETTERS = 50; // dead letters shown at first, and more at a time
const ROUTES = 200; // routes shown at most
const SILENCE = 10_000; // ms without a word of the relay, which speaks every second
const MAX_WAIT = 15; // seconds between attempts to reach it
const ERROR_SHOWN = 10 * 60_000; // ms that a sink's last error is shown when the sink is well again
const SAMPLE = {
  message_id: "wamid.HBgMMzU5ODg0NjE4MTgAERgSTMwMTQ5ODY1NTFERUY0AA==",
  message_status: "delivered",
  channel: { channel_type: "Whatsapp", name: "Channel Name", sender_id: "5491122223333" },
  campaign: { id: "074116ff-76f3-47b7-8be2-92f465718a3e", name: "campaign name" },
  event_name: "msg_status",
  event_timestamp: "1687548944",
  recipient: { id: "541112341234" },
};

// ---- words and figures ---------------------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);
const sum = (numbers) => numbers.reduce((all, number) => all + number, 0);
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

function el(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const badge = (text, kind = "") => el("span", { className: `badge ${kind}`, textContent: text });

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const count = (number) => (number < 100_000 ? whole : short).format(number);
const rate = (number) => (number >= 100 ? count(Math.round(number)) : number.toFixed(1));

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const unit = Math.min(Math.floor(Math.log2(Math.max(number, 1)) / 10), units.length - 1);
  return `${(number / 1024 ** unit).toFixed(unit > 1 ? 1 : 0)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} days`;
}

let clockAhead = 0; // ms that the relay's clock is ahead of the browser's
const relayNow = () => Date.now() + clockAhead;

function ago(at) {
  const seconds = Math.floor((relayNow() - Date.parse(at)) / 1000);
  return seconds < 1 ? "now" : `${duration(seconds).replace(".0", "")} ago`;
}

const time = (at) =>
  el("time", { dateTime: at, title: new Date(at).toLocaleString(), textContent: ago(at) });

// Makes the children of a list those of the items. Rows that are there already stay what they are, so that none loses the
// focus while somebody works with it.
function reconcile(list, items, key, create, update = () => {}) {
  const keys = items.map((item) => String(key(item)));
  const wanted = new Set(keys);
  const rows = new Map();
  for (const row of [...list.children]) {
    if (wanted.has(row.dataset.key)) rows.set(row.dataset.key, row);
    else row.remove();
  }
  let place = list.firstElementChild;
  items.forEach((item, number) => {
    let row = rows.get(keys[number]);
    if (!row) {
      row = create(item);
      row.dataset.key = keys[number];
    }
    if (row === place) place = place.nextElementSibling;
    else list.insertBefore(row, place);
    update(row, item);
  });
}

// ---- charts --------------------------------------------------------------------------------------------------------

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// A figure with its name and a chart of the last minutes.
class Figure {
  constructor(name, trouble = false) {
    this.values = [];
    this.text = el("dd");
    this.line = svg("path", {});
    this.area = svg("path", { class: "area" });
    this.chart = svg("svg", {
      class: trouble ? "spark trouble" : "spark",
      viewBox: "0 0 100 20",
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    });
    this.chart.append(this.area, this.line);
    this.element = el("div", {}, el("dt", { textContent: name }), this.text, this.chart);
  }

  show(value, text, unit = "") {
    this.values.push(value);
    if (this.values.length > HISTORY) this.values.shift();
    this.text.replaceChildren(text, unit && el("small", { textContent: ` ${unit}` }));
    const most = Math.max(...this.values);
    this.chart.classList.toggle("idle", most === 0);
    this.element.title = `At most ${most < 100 ? +most.toFixed(1) : count(most)} in the last ${HISTORY / 60} minutes`;
    const step = 100 / (Math.max(this.values.length, AT_FIRST) - 1);
    const first = 100 - (this.values.length - 1) * step;
    const y = (number) => (19 - (18 * number) / Math.max(most, 1)).toFixed(2);
    const points = this.values.map((number, at) => `${(first + at * step).toFixed(2)} ${y(number)}`);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M${first.toFixed(2)} 20L${points.join("L")}L100 20Z`);
  }
}

// ---- the API -------------------------------------------------------------------------------------------------------

let token = sessionStorage.getItem("token");
let login = null; // while the token is being asked for

function askForToken() {
  login ??= new Promise((resolve) => {
    byId("login-wrong").hidden = token === null;
    byId("login").showModal();
    byId("login-form").onsubmit = (event) => {
      event.preventDefault();
      token = byId("token").value;
      sessionStorage.setItem("token", token);
      login = null;
      byId("token").value = "";
      byId("login").close();
      resolve();
    };
  });
  return login;
}

async function request(method, path, body, signal) {
  for (;;) {
    const used = token;
    const headers = {};
    if (used !== null) headers.authorization = `Bearer ${used}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    const response = await fetch(`api/v1/${path}`, { method, headers, body, signal });
    if (response.ok) return response;
    if (response.status !== 401) {
      const problem = await response.json().catch(() => ({}));
      throw new Error(problem.detail ?? `it answered ${response.status}`);
    }
    // Somebody else may have got the right one meanwhile.
    if (used === token) await askForToken();
  }
}

const get = async (path) => (await request("GET", path)).json();
const send = async (method, path, body) =>
  (await request(method, path, body === undefined ? undefined : JSON.stringify(body))).json();

function notify(text) {
  byId("notice").textContent = text;
  clearTimeout(notify.timer);
  notify.timer = setTimeout(() => byId("notice").replaceChildren(), 6000);
}

// Does a button's work when it is pressed, one at a time; what goes wrong is said.
function onPress(button, work) {
  button.addEventListener("click", async () => {
    if (button.ariaBusy === "true") return;
    button.ariaBusy = "true";
    try {
      await work();
    } catch (error) {
      notify(error.message);
    } finally {
      button.ariaBusy = "false";
    }
  });
}

function confirmed(question, verb) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = question;
  byId("confirm-yes").textContent = verb;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}

// Loads something again when what it depends on has changed, but not all the time.
function refresher(seconds, load) {
  let seen;
  let stale = false;
  let due = 0;
  return async (state) => {
    stale ||= state !== seen;
    seen = state;
    if (!stale || Date.now() < due) return;
    stale = false;
    due = Infinity;
    try {
      await load();
    } catch {
      stale = true;
    }
    due = Date.now() + seconds * 1000;
  };
}

// ---- the relay and its sinks ---------------------------------------------------------------------------------------

const totals = {
  accepted: new Figure("Accepted"),
  delivered: new Figure("Delivered"),
  lag: new Figure("Longest lag"),
  parked: new Figure("Parked", true),
  dead: new Figure("Dead letters", true),
  journal: new Figure("Journal on disk"),
};
let before = null; // the status before this one

function show(status) {
  clockAhead = Date.parse(status.started_at) + status.uptime_seconds * 1000 - Date.now();
  byId("unreachable").hidden = true;
  byId("version").textContent = status.version;
  byId("ready").textContent = status.ready ? "accepting" : "not accepting";
  byId("ready").className = status.ready ? "badge good" : "badge bad";
  byId("unready").hidden = status.ready;
  byId("unready").textContent = `No events are accepted: ${status.unready_because}`;
  byId("footer").textContent =
    `Up for ${duration(status.uptime_seconds)}. Charts show the last ${HISTORY / 60} minutes since this page was opened.`;
  showTotals(status);
  showSinks(status.sinks);
  showRules(status.rules);
  showSinkNames(status);
  for (const element of document.querySelectorAll("time")) element.textContent = ago(element.dateTime);
  const { sinks, started_at, dead_letters } = status;
  const failed = sum(sinks.map((sink) => sink.attempts_failed));
  const moved = [status.journal.end, sum(sinks.map((sink) => sink.delivered + sink.lag_events))];
  refreshRoutes([started_at, status.rules.loaded_at, failed, ...moved].join());
  refreshFailures([started_at, failed].join());
  // There may be as many as before, and yet others.
  refreshLetters(JSON.stringify([started_at, failed, dead_letters]));
  before = status;
}

function showTotals(status) {
  const { sinks, journal } = status;
  const passed = before && status.started_at === before.started_at && status.uptime_seconds - before.uptime_seconds;
  const accepted = passed > 0 ? (journal.end - before.journal.end) / passed : 0;
  const delivered = sum(sinks.map((sink) => sink.rate));
  const lag = Math.max(0, ...sinks.map((sink) => sink.lag_seconds));
  const parked = sum(sinks.map((sink) => sink.parked));
  const dead = sum(Object.values(status.dead_letters));
  totals.accepted.show(accepted, rate(accepted), "/s");
  totals.delivered.show(delivered, rate(delivered), "/s");
  totals.lag.show(lag, duration(lag));
  totals.parked.show(parked, count(parked));
  totals.dead.show(dead, count(dead));
  const state = journal.state === "serving" ? "" : journal.state;
  // Relays that share a journal on Kafka have none on disk.
  if (journal.disk_bytes === null) totals.journal.show(0, state || "on Kafka");
  else totals.journal.show(journal.disk_bytes, bytes(journal.disk_bytes), state);
  totals.dead.text.classList.toggle("attention", dead > 0);
}

function sinkState(sink) {
  if (sink.paused) return ["paused", "", "An operator has paused it"];
  if (sink.unheld_partitions > 0) return ["unheld", "bad", "No relay delivers from some of the journal's partitions"];
  if (sink.breaker === "open") return ["failing", "bad", "It has failed too often, and is only probed"];
  return ["ok", "good", "Deliveries are made"];
}

function createSink({ name }) {
  const row = el("article", { className: "sink" });
  const title = el("h3", { textContent: name });
  const state = badge("");
  const what = el("p");
  const button = el("button", { type: "button" });
  const last = el("p", { className: "last" });
  const figures = {
    rate: new Figure("Delivered"),
    lag: new Figure("Lag"),
    parked: new Figure("Parked", true),
    dead: new Figure("Dead letters", true),
  };
  const list = el("dl", { className: "figures" }, ...Object.values(figures).map((figure) => figure.element));
  row.append(el("div", { className: "who" }, el("div", { className: "name" }, title, state), what), list, button, last);
  row.ariaLabel = `Sink ${name}`;
  row.parts = { state, what, button, last, figures };
  onPress(button, async () => {
    const path = `sinks/${encodeURIComponent(name)}/${row.paused ? "resume" : "pause"}`;
    const sink = await send("POST", path);
    updateSinkState(row, sink);
    notify(`${name} is ${sink.paused ? "paused: events wait in the journal" : "resumed"}`);
  });
  return row;
}

function updateSinkState(row, sink) {
  const { state, button } = row.parts;
  const [word, kind, why] = sinkState(sink);
  Object.assign(state, { textContent: word, className: `badge ${kind}`, title: why });
  row.paused = sink.paused;
  button.textContent = sink.paused ? "Resume" : "Pause";
  button.ariaLabel = `${button.textContent} ${sink.name}`;
}

function updateSink(row, sink) {
  updateSinkState(row, sink);
  const { what, last, figures } = row.parts;
  what.textContent = `${sink.type}, ${count(sink.delivered)} delivered, ${count(sink.in_flight)} under way`;
  figures.rate.show(sink.rate, rate(sink.rate), "/s");
  figures.lag.show(sink.lag_events, count(sink.lag_events), sink.lag_events ? `events, ${duration(sink.lag_seconds)}` : "");
  figures.parked.show(sink.parked, count(sink.parked));
  figures.dead.show(sink.dead_letters, count(sink.dead_letters));
  const error = sink.last_error;
  const isWell = sink.breaker === "closed" && sink.unheld_partitions === 0;
  last.hidden = !error || (isWell && relayNow() - Date.parse(error.at) > ERROR_SHOWN);
  if (error) last.replaceChildren("Last error ", time(error.at), `, ${error.kind}: ${error.text}`);
}

function showSinks(sinks) {
  byId("sink-list").querySelector(".empty")?.remove();
  reconcile(byId("sink-list"), sinks, (sink) => sink.name, createSink, updateSink);
}

// ---- routes and failures -------------------------------------------------------------------------------------------

let routes = { routes: [], unrouted: 0 };

const refreshRoutes = refresher(2, async () => {
  routes = await get("routes");
  showRoutes();
});

function showRoutes() {
  const text = byId("route-filter").value.trim().toLowerCase();
  const found = routes.routes.filter(({ name, events }) =>
    [name, ...Object.keys(events)].some((word) => word.toLowerCase().includes(text)),
  );
  byId("route-filter").hidden = routes.routes.length < 10;
  reconcile(byId("route-list"), found.slice(0, ROUTES), (route) => route.name, () => el("li"), updateRoute);
  const unrouted = `Events that no route matched: ${count(routes.unrouted)}`;
  byId("route-rest").textContent =
    found.length > ROUTES ? `${count(found.length - ROUTES)} more routes. ${unrouted}` : unrouted;
  byId("route-rest").hidden = false;
}

function updateRoute(row, route) {
  const sinks = Object.entries(route.events).map(([sink, events]) =>
    el("span", { title: `${whole.format(events)} events brought to ${sink}` }, `${sink} `, el("strong", { textContent: count(events) })),
  );
  const end = el("span", { className: "end" });
  sinks.forEach((sink, at) => end.append(at ? ", " : "", sink));
  const final = route.final ? [badge("final")] : [];
  row.replaceChildren(el("span", { className: "grow", textContent: route.name }), ...final, end);
}

const refreshFailures = refresher(1, async () => {
  const { failures } = await get("failures");
  byId("failure-none").hidden = failures.length > 0;
  const key = ({ at, sink, event_id, attempt }) => [at, sink, event_id, attempt].join();
  reconcile(byId("failure-list"), failures, key, (failure) =>
    el(
      "li",
      {},
      el("strong", { textContent: failure.sink }),
      badge(failure.kind, "bad"),
      el("span", { className: "end" }, time(failure.at)),
      el("span", { className: "line", textContent: failure.text }),
      el("span", { className: "line mono", textContent: `${failure.event_id}, attempt ${failure.attempt}` }),
    ),
  );
});

// ---- dead letters --------------------------------------------------------------------------------------------------

let shownLetters = LETTERS;
let letters = { dead_letters: [], next: null, up_to: 0 };
let letterLoads = 0;
let sinkNames = "";

function showSinkNames({ sinks, dead_letters }) {
  const names = [...new Set([...sinks.map((sink) => sink.name), ...Object.keys(dead_letters)])];
  if (sinkNames === names.join()) return;
  sinkNames = names.join();
  const option = (name) => el("option", { value: name, textContent: name || "all" });
  reconcile(byId("filter").elements.sink, ["", ...names], (name) => name, option);
  const targets = sinks.map((sink) => sink.name);
  reconcile(byId("letter-to"), ["", ...targets], (name) => name, (name) =>
    el("option", { value: name, textContent: name || "its own sink" }),
  );
}

function filter() {
  return Object.fromEntries([...new FormData(byId("filter"))].map(([name, text]) => [name, text.trim()]).filter(([, text]) => text));
}

async function loadLetters() {
  const wanted = filter();
  const load = ++letterLoads;
  const found = await get(`dead-letters?${new URLSearchParams({ ...wanted, limit: shownLetters })}`);
  if (load !== letterLoads) return; // others were asked for meanwhile
  letters = found;
  const { dead_letters: list, next } = letters;
  const filtered = Object.keys(wanted).length > 0;
  byId("letter-none").hidden = list.length > 0;
  byId("letter-none").textContent = filtered ? "No dead letter matches." : "No dead letters.";
  byId("letter-bulk").hidden = list.length === 0;
  byId("letter-count").textContent = next === null ? `${count(list.length)} in all` : `The first ${count(list.length)}`;
  byId("letter-rest").hidden = next === null;
  reconcile(byId("letter-list"), list, (letter) => letter.id, createLetter);
}

const refreshLetters = refresher(2, loadLetters);

function createLetter(letter) {
  const act = (word, work, className = "") => {
    const button = el("button", { type: "button", textContent: word, className, ariaLabel: `${word} dead letter ${letter.id}` });
    onPress(button, work);
    return button;
  };
  return el(
    "li",
    { className: "letter" },
    el("span", { className: "muted", textContent: `#${letter.id}` }),
    el("strong", { textContent: letter.sink }),
    badge(letter.reason, letter.reason === "unrouted" ? "warn" : "bad"),
    el("span", { className: "grow" }, time(letter.died_at)),
    el(
      "span",
      { className: "acts" },
      act("Inspect", () => inspect(letter.id)),
      act("Replay", () => replay(letter.id)),
      act("Discard", () => discard(letter.id), "danger"),
    ),
    el("span", {
      className: "line",
      textContent: [letter.status, `${letter.error_kind}: ${letter.error}`, attempts(letter)].filter(Boolean).join(", "),
    }),
  );
}

const attempts = ({ attempts: number }) => `${number} ${number === 1 ? "attempt" : "attempts"}`;

// A list that has lost the button that was pressed still has the focus.
async function afterwards(text) {
  notify(text);
  await loadLetters();
  if (document.activeElement === document.body) byId("letters-title").focus();
}

async function replay(id, to) {
  await send("POST", `dead-letters/${id}/replay`, to ? { to } : {});
  await afterwards(`Dead letter ${id} is tried again`);
}

async function discard(id) {
  if (!(await confirmed(`Discard dead letter ${id} for good? Its event is not delivered.`, "Discard"))) return false;
  await send("DELETE", `dead-letters/${id}`);
  await afterwards(`Dead letter ${id} is discarded`);
  return true;
}

// Does something with all dead letters that match now, a thousand at a time.
async function all(what, verb) {
  const { dead_letters: list, next, up_to } = letters;
  const wanted = filter();
  const words = Object.entries(wanted).map(([name, text]) => `${name.replace("_", " ")} ${text}`);
  const number = next === null ? count(list.length) : `more than ${count(list.length)}`;
  const which = words.length ? ` with ${words.join(", ")}` : "";
  const loss = what === "discard" ? " Their events are not delivered." : "";
  if (!(await confirmed(`${verb} ${number} dead letters${which}?${loss}`, `${verb} all`))) return;
  // Not those that nobody has seen yet.
  let body = { ...wanted, limit: 1000, ...(next === null && { up_to }) };
  let [done, skipped] = [0, 0];
  for (let remaining = 1; remaining > 0; ) {
    const answer = await send("POST", `dead-letters/${what}`, body);
    done += answer.done;
    skipped += answer.skipped;
    remaining = answer.remaining;
    body = { ...body, after: answer.last ?? undefined, up_to: answer.up_to };
    notify(`${count(done)} so far, ${count(remaining)} left`);
  }
  const left = skipped ? `; ${count(skipped)} stay, since no sink is theirs` : "";
  await afterwards(`${count(done)} dead letters ${what === "discard" ? "discarded" : "tried again"}${left}`);
}

async function inspect(id) {
  const text = await (await request("GET", `dead-letters/${id}`)).text();
  const letter = JSON.parse(text);
  const fact = (name, value) =>
    value === null || value === undefined ? [] : [el("dt", { textContent: name }), el("dd", {}, value)];
  byId("letter-title").textContent = `Dead letter ${id} of ${letter.sink}`;
  byId("letter-facts").replaceChildren(
    ...fact("Reason", letter.reason),
    ...fact("Error", `${letter.error_kind}: ${letter.error}`),
    ...fact("Attempts", String(letter.attempts)),
    ...fact("Died", time(letter.died_at)),
    ...fact("First failed", letter.first_failed_at && time(letter.first_failed_at)),
    ...fact("Received", letter.received_at && time(letter.received_at)),
    ...fact("Route", letter.route),
    ...fact("Event", letter.event_id),
    ...fact("Message", letter.message_id),
    ...fact("Status", letter.status),
    ...fact("Sender", letter.sender_id),
    ...fact("Campaign", letter.campaign_id),
  );
  byId("letter-body").textContent = body(text, letter);
  byId("letter-to").value = "";
  byId("letter").dataset.id = id;
  byId("letter").showModal();
}

// The event, indented where that changes nothing but spaces: JavaScript would round long numbers.
function body(text, letter) {
  if (!letter.body) return "This version can't read the stored event.";
  const raw = text.slice(text.indexOf(',"body":') + 8, -1);
  const dense = raw.replace(/("(?:\\.|[^"\\])*")|\s+/g, "$1");
  return JSON.stringify(letter.body) === dense ? JSON.stringify(letter.body, null, 2) : raw;
}

// ---- rules ---------------------------------------------------------------------------------------------------------

function showRules({ loaded_at, last_reload: last }) {
  const refused = last?.outcome === "refused";
  byId("refused").hidden = !refused;
  const words = { applied: "applied", unchanged: "found nothing new", refused: "refused" };
  byId("rules-state").replaceChildren(
    "In force for ",
    duration((relayNow() - Date.parse(loaded_at)) / 1000),
    ". ",
    ...(last ? ["The last reload was ", badge(words[last.outcome], refused ? "bad" : "good"), " ", time(last.at), "."] : ["Not reloaded since the start."]),
  );
  const problems = last?.problems ?? [];
  byId("problems").hidden = problems.length === 0;
  byId("problems").className = refused ? "problems bad" : "problems";
  reconcile(byId("problems"), problems, (problem) => problem, (problem) => el("li", { textContent: problem }));
}

// ---- explain -------------------------------------------------------------------------------------------------------

const quoted = (value) => (value === null ? "nothing" : `“${value}”`);

function explainedRoute(route) {
  const name = el("strong", { textContent: route.route });
  const line = (text) => el("span", { className: "line", textContent: text });
  switch (route.outcome) {
    case "matched":
      return el("li", {}, badge("matches", "good"), name, line(`To ${route.to.join(", ")}${route.final ? "; final" : ""}`));
    case "not_matched":
      return el(
        "li",
        {},
        badge("doesn't match"),
        name,
        ...route.because.map(({ field, wanted, found }) => line(`${field}: wanted ${wanted}, found ${quoted(found)}`)),
      );
    default:
      return el("li", {}, badge("not tried"), name, line(`${route.after} above is final`));
  }
}

function explainedSink({ sink, route, sent, error }) {
  const row = el("li", {}, el("strong", { textContent: sink }), el("span", { className: "muted", textContent: `by route ${route}` }));
  if (error) row.append(badge("can't be sent", "bad"), el("span", { className: "line", textContent: error }));
  if (sent) {
    const pairs = [...sent.target, ...sent.headers].flatMap(([name, value]) => [
      el("dt", { textContent: name }),
      el("dd", { textContent: value }),
    ]);
    row.append(el("dl", { className: "facts sent" }, ...pairs));
  }
  return row;
}

function explained({ event_id, routes: list, sinks }) {
  return el(
    "section",
    { ariaLabel: `Event ${event_id}` },
    el("p", { className: "mono", textContent: event_id }),
    el("h3", { textContent: "Routes" }),
    el("ol", { className: "rows" }, ...list.map(explainedRoute)),
    el("h3", { textContent: "What each sink would be sent, beside the event" }),
    sinks.length
      ? el("ul", { className: "rows" }, ...sinks.map(explainedSink))
      : el("p", { className: "muted", textContent: "No route matches: no sink is sent anything." }),
  );
}

// ---- the page ------------------------------------------------------------------------------------------------------

// Shows what the relay says until it falls silent.
async function listen() {
  const silence = new AbortController();
  let timer;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => silence.abort(new Error("it says nothing")), SILENCE);
  };
  const response = await request("GET", "stream", undefined, silence.signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    heard();
    for (let rest = ""; ; ) {
      const { value, done } = await reader.read();
      if (done) throw new Error("it has ended the connection");
      heard();
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "));
        if (data) show(JSON.parse(data.slice(6)));
      }
    }
  } finally {
    clearTimeout(timer);
  }
}

async function follow() {
  for (let wait = 1; ; wait = Math.min(wait * 2, MAX_WAIT)) {
    before = null;
    try {
      await listen();
    } catch (error) {
      if (before) wait = 1;
      byId("ready").textContent = "unknown";
      byId("ready").className = "badge";
      byId("unreachable").textContent =
        `No news from the relay: ${error.message}. What is shown may be out of date. Trying again in ${wait} s.`;
      byId("unreachable").hidden = false;
    }
    await sleep(wait);
  }
}

function start() {
  byId("totals").append(...Object.values(totals).map((figure) => figure.element));
  byId("event").value = JSON.stringify(SAMPLE, null, 2);
  byId("route-filter").addEventListener("input", showRoutes);

  const search = () => {
    shownLetters = LETTERS;
    loadLetters().catch((error) => notify(error.message));
  };
  let typing;
  byId("filter").addEventListener("submit", (event) => event.preventDefault());
  byId("filter").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(search, 200);
  });
  // The fields are empty after the event.
  byId("filter").addEventListener("reset", () => setTimeout(search));
  onPress(byId("replay-all"), () => all("replay", "Replay"));
  onPress(byId("discard-all"), () => all("discard", "Discard"));
  onPress(byId("letter-more"), () => {
    shownLetters += LETTERS;
    return loadLetters();
  });

  const letter = byId("letter");
  onPress(byId("letter-replay"), async () => {
    await replay(letter.dataset.id, byId("letter-to").value);
    letter.close();
  });
  onPress(byId("letter-discard"), async () => {
    if (await discard(letter.dataset.id)) letter.close();
  });
  byId("letter-close").addEventListener("click", () => letter.close());
  byId("confirm-yes").addEventListener("click", () => byId("confirm").close("yes"));
  byId("confirm-no").addEventListener("click", () => byId("confirm").close());
  // Nothing can be shown without the token; closing the question asks for it when the page is used again.
  byId("login").addEventListener("close", () => {
    byId("locked").hidden = login === null;
  });
  byId("unlock").addEventListener("click", () => byId("login").showModal());

  onPress(byId("reload"), async () => {
    const { outcome } = await send("POST", "reload");
    notify(outcome === "applied" ? "The rules and settings are in force" : "Nothing has changed");
  });
  byId("explain-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const { event: text, token: sender } = event.target.elements;
    try {
      const query = sender.value && `?${new URLSearchParams({ token: sender.value })}`;
      const answer = await request("POST", `explain${query}`, text.value);
      byId("explained").replaceChildren(...(await answer.json()).map(explained));
    } catch (error) {
      byId("explained").replaceChildren(el("p", { className: "wrong", textContent: error.message }));
    }
  });
  follow();
}

start();
