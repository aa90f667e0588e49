// The live page of one guard. It asks the API that it comes from, and nobody else; what it shows is put in as text.
"use strict";

(() => {
  const KEPT = 10000; // faults that are kept here, as many as the guard keeps
  const SHOWN = 200; // rows of faults
  const SPAN = 300; // seconds that plots show at most
  const LEAST = 60; // and at least
  const EVERY = 2000; // milliseconds between two looks at sessions and causes
  const PAGE = 100; // sessions that are asked for at once
  const MOST = 500;
  const SYMBOLS = { error: "✖", warning: "▲", info: "●" };
  const RANK = { error: 0, warning: 1, info: 2 };
  const STATES = { busy: "busy", idle: "idle", "idle-in-transaction": "idle in transaction", unknown: "not followed" };
  const SVG = "http://www.w3.org/2000/svg";

  const at = (id) => document.getElementById(id);
  const view = {
    run: null, last: "", paused: false, cause: null, limit: PAGE,
    cleared: { place: 0, at: "" }, // what has come until then isn't shown
    unseen: 0,
  };
  let figures = []; // the latest last
  let faults = []; // the same, each with its place
  let causes = [];
  const opened = new Map(); // causes that are shown in full, and what is shown

  // Making parts of the page

  function make(name, options = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(options)) {
      if (value === null || value === undefined || value === false) continue;
      if (key === "on") made.addEventListener("click", value);
      else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== ""));
    return made;
  }

  function draw(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const theirs = (text, options = {}) => make("bdi", options, text);
  const badge = (severity) => make("span", { class: `badge ${severity}` }, `${SYMBOLS[severity]} ${severity}`);
  const clock = (text) => new Date(text).toLocaleTimeString();
  const counted = (number, one, many = `${one}s`) => `${number.toLocaleString()} ${number === 1 ? one : many}`;

  function short(number) {
    if (number >= 1e9) return `${(number / 1e9).toFixed(1)} G`;
    if (number >= 1e6) return `${(number / 1e6).toFixed(1)} M`;
    if (number >= 1e4) return `${(number / 1e3).toFixed(1)} k`;
    return number >= 10 || number === Math.round(number) ? Math.round(number).toLocaleString() : number.toFixed(1);
  }

  function duration(seconds) {
    if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
    if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
    if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
    return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
  }

  function program(process) {
    if (process === null) return "";
    return process.cmdline.length ? process.cmdline.join(" ") : process.name;
  }

  async function ask(path) {
    const response = await fetch(path, { credentials: "same-origin" });
    if (response.status === 401) {
      location.assign("/login");
      throw new Error("the token is needed");
    }
    if (!response.ok) throw new Error(`${path}: ${response.status}`);
    return response;
  }

  function status(text, kind) {
    const badge = at("status");
    badge.textContent = text;
    badge.className = `badge ${kind}`;
  }

  // Plots

  function rates(read) {
    const points = [];
    for (let n = 1; n < figures.length; n += 1) {
      const seconds = (figures[n].time - figures[n - 1].time) / 1000;
      const more = read(figures[n]) - read(figures[n - 1]);
      // Where nobody looked for a while, or another guard has begun, there is no line.
      points.push({ time: figures[n].time, value: seconds > 0 && seconds < 5 && more >= 0 ? more / seconds : null });
    }
    return points;
  }

  function ceiling(most) {
    if (most <= 0) return 1;
    const power = 10 ** Math.floor(Math.log10(most));
    return [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= most);
  }

  function plot(id, what, { lines = [], areas = [] }) {
    const width = 300;
    const height = 80;
    const now = figures[figures.length - 1].time;
    const span = Math.min(SPAN, Math.max(LEAST, (now - figures[0].time) / 1000));
    const x = (time) => width - ((now - time) / 1000 / span) * width;
    const within = (points) => points.filter((point) => x(point.time) >= -5);
    const values = [...lines, ...areas].flatMap((one) => within(one.points).map((point) => point.value || 0));
    const top = ceiling(Math.max(0, ...values));
    const y = (value) => height - (value / top) * (height - 12);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img" });
    svg.append(draw("title", {}, what));
    svg.append(draw("line", { class: "axis", x1: 0, x2: width, y1: 12, y2: 12 }));
    svg.append(draw("line", { class: "axis", x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5 }));
    for (const { points, name } of areas) {
      const inside = within(points);
      if (!inside.length) continue;
      const edge = inside.map((point) => `${x(point.time).toFixed(1)} ${y(point.value).toFixed(1)}`).join("L");
      const first = x(inside[0].time).toFixed(1);
      const last = x(inside[inside.length - 1].time).toFixed(1);
      svg.append(draw("path", { class: `area ${name}`, d: `M${first} ${height}L${edge}L${last} ${height}Z` }));
    }
    for (const { points, name } of lines) {
      let path = "";
      let isDown = false;
      for (const point of within(points)) {
        if (point.value === null) {
          isDown = false;
          continue;
        }
        path += `${isDown ? "L" : "M"}${x(point.time).toFixed(1)} ${y(point.value).toFixed(1)}`;
        isDown = true;
      }
      svg.append(draw("path", { class: `line ${name}`, d: path || "M0 0" }));
    }
    for (const fault of faults.slice(-100)) {
      const place = x(fault.time);
      if (place >= 0 && fault.record.severity === "error" && fault.record.repeat_of === null) {
        svg.append(draw("line", { class: "fault", x1: place, x2: place, y1: 12, y2: height }));
      }
    }
    at(`plot-${id}`).replaceChildren(svg, make("span", { class: "muted nowrap" }, `up to ${short(top)}, the last ${span < 120 ? `${Math.round(span)} s` : `${Math.round(span / 60)} min`}`));
  }

  function last(points) {
    const point = points[points.length - 1];
    return point === undefined || point.value === null ? null : point.value;
  }

  function showFigures() {
    const latest = figures[figures.length - 1];
    if (latest === undefined) return;
    const requests = rates((one) => one.requests);
    const frontend = rates((one) => one.bytes.frontend);
    const backend = rates((one) => one.bytes.backend);
    const connections = rates((one) => one.clients);
    const stack = (...states) =>
      figures.map((one) => ({ time: one.time, value: states.reduce((sum, state) => sum + one.open[state], 0) }));
    const told = (value) => (value === null ? "–" : short(value));
    const total = last(frontend) === null ? null : last(frontend) + last(backend);
    at("value-requests").textContent = told(last(requests));
    at("value-bytes").textContent = total === null ? "–" : `${short(total)}${total < 1e4 ? " " : ""}B`;
    at("value-sessions").textContent = short(stack("busy", "idle", "idle-in-transaction", "unknown").pop().value);
    at("value-connections").textContent = told(last(connections));
    plot("requests", "Requests a second", { lines: [{ points: requests, name: "frontend" }] });
    plot("bytes", "Bytes a second", {
      lines: [{ points: backend, name: "backend" }, { points: frontend, name: "frontend" }],
    });
    plot("sessions", "Sessions that are open", {
      areas: [
        { points: stack("busy", "idle-in-transaction", "idle", "unknown"), name: "idle" },
        { points: stack("busy", "idle-in-transaction"), name: "waiting" },
        { points: stack("busy"), name: "busy" },
      ],
    });
    plot("connections", "New connections a second", { lines: [{ points: connections, name: "frontend" }] });
    const down = latest.servers.filter((one) => one.answers === false);
    at("down").hidden = down.length === 0;
    at("down").textContent = down.length
      ? `The server${down[0].name === null ? "" : ` of ${down.map((one) => one.name).join(", ")}`} could not be connected to for the last client: the guard's log says why.`
      : "";
    const times = latest.faults.reduce((sum, one) => sum + one.times, 0);
    const refused = Object.values(latest.refused).reduce((sum, number) => sum + number, 0);
    const parts = [
      `${counted(latest.clients, "client")} so far`,
      refused ? `${counted(refused, "of them was", "of them were")} not logged in` : "",
      counted(latest.requests, "request"),
      counted(times, "fault"),
      latest.lost_records ? `${counted(latest.lost_records, "record")} lost` : "",
      latest.internal_errors ? `${counted(latest.internal_errors, "internal error")} (the guard's log has more)` : "",
    ];
    at("totals").textContent = `${parts.filter(Boolean).join(", ")}.`;
  }

  // Causes

  function isShown(cause) {
    return cause.last_at > view.cleared.at;
  }

  function showCauses() {
    const shown = causes.filter(isShown);
    const list = at("causes");
    const before = new Map([...list.children].map((item) => [Number(item.dataset.cause), item]));
    const items = shown.map((cause) => {
      const item = before.get(cause.cause) || causeItem(cause);
      const extent = [cause.times === 1 ? "once" : `${cause.times.toLocaleString()} times`];
      if (cause.sessions > 1) extent.push(`in ${counted(cause.sessions, "session")}`);
      if (cause.processes > 1) extent.push(`by ${counted(cause.processes, "process", "processes")}`);
      item.querySelector(".title").textContent = `Cause ${cause.cause}: ${cause.title}`;
      item.querySelector(".extent").textContent = `(${extent.join(", ")}; the last at ${clock(cause.last_at)})`;
      return item;
    });
    const isSame = items.length === list.children.length && items.every((item, n) => item === list.children[n]);
    if (!isSame) list.replaceChildren(...items);
    document.title = shown.length ? `(${shown.length}) pgguard: live` : "pgguard: live";
    at("no-causes").hidden = shown.length > 0;
    at("no-causes").textContent = causes.length ? "Nothing since the view was cleared." : "No fault has been recorded.";
    const hidden = causes.length - shown.length;
    at("unclear").hidden = !view.cleared.place && !hidden;
    at("unclear").textContent = hidden ? `Show all (${counted(hidden, "cause")} hidden)` : "Show all";
  }

  function causeItem(cause) {
    const more = make("div");
    const show = make("button", { type: "button", "aria-expanded": "false", on: () => toggle(cause.cause, show, more) });
    show.textContent = "What happened";
    const kept = opened.get(cause.cause);
    if (kept !== undefined) {
      more.append(kept);
      show.setAttribute("aria-expanded", "true");
    }
    return make(
      "li", { "data-cause": cause.cause },
      badge(cause.severity), " ", make("strong", { class: "title" }), " ",
      make("span", { class: "muted extent" }), make("br"), theirs(cause.summary),
      make("div", { class: "bar" }, show, make("button", { type: "button", on: () => chooseCause(cause.cause) }, "Its sessions")),
      more,
    );
  }

  async function toggle(number, button, place) {
    if (opened.has(number)) {
      opened.delete(number);
      place.replaceChildren();
      button.setAttribute("aria-expanded", "false");
      return;
    }
    button.setAttribute("aria-expanded", "true");
    try {
      const response = await ask(`/causes/${number}`);
      const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
      const article = document.adoptNode(parsed.body.firstElementChild);
      opened.set(number, article);
      place.replaceChildren(article);
    } catch (error) {
      button.setAttribute("aria-expanded", "false");
      place.replaceChildren(make("p", { class: "note" }, "It isn't kept any more in full."));
    }
  }

  function chooseCause(number) {
    view.cause = number;
    view.limit = PAGE;
    at("of-cause").hidden = number === null;
    at("of-cause").textContent = number === null ? "" : `Only those of cause ${number} ✕`;
    showSessions();
    if (number !== null) at("sessions").scrollIntoView({ behavior: "smooth" });
  }

  // Sessions

  const cell = (name, options, ...children) => make("td", { ...options, "data-name": name }, ...children);

  function processLine(one) {
    return make("div", {}, make("span", { class: "nowrap" }, `pid ${one.pid}`), " ", theirs(program(one.process)));
  }

  function sessionRow(told) {
    const { session } = told;
    const who = [make("div", {}, theirs(session.user || "unknown"), " / ", theirs(session.database || "unknown"))];
    if (session.application_name) who.push(make("div", { class: "muted" }, theirs(session.application_name)));
    const way = session.through ? `through ${session.through}, from ` : "";
    who.push(make("div", { class: "muted" }, `${way}${session.client || "a Unix socket"}`));
    if (told.state === undefined) {
      return make(
        "tr", { class: "over" }, make("th", { scope: "row", "data-name": "Session" }, String(session.id)), cell("Who", {}, ...who),
        cell("State", {}, "over"), cell("Last request", {}), cell("Processes that have it open", {}), cell("Age", {}),
      );
    }
    const request = told.last_request;
    const asked = request === null ? [] : [
      make("div", {}, theirs(request.sql || "", { class: "sql" })),
      make("div", { class: "muted" }, `${request.state}, number ${request.n} at ${clock(request.at)}${request.pid === null ? "" : `, by pid ${request.pid}`}`),
    ];
    const holders = told.holders.length ? told.holders : told.opener === null ? [] : [told.opener];
    const several = told.holders.length > 1;
    return make(
      "tr", {},
      make("th", { scope: "row", "data-name": "Session" }, String(session.id), ...told.causes.map((number) =>
        make("div", {}, make("a", { href: `#cause-${number}` }, `cause ${number}`)))),
      cell("Who", {}, ...who),
      cell("State", { class: "state" }, STATES[told.state]),
      cell("Last request", {}, ...asked),
      cell("Processes that have it open", { class: several ? "several" : null }, ...holders.map(processLine)),
      cell("Age", { class: "figure nowrap" }, duration(told.age)),
    );
  }

  let asking = false;
  let isToAskAgain = false;
  async function showSessions() {
    isToAskAgain = asking; // what has been chosen meanwhile holds
    if (asking) return;
    asking = true;
    try {
      const query = new URLSearchParams({ order: at("order").value, limit: view.limit });
      if (at("state").value) query.set("state", at("state").value);
      if (at("search").value) query.set("search", at("search").value);
      if (view.cause !== null) query.set("cause", view.cause);
      const seen = await (await ask(`/api/sessions?${query}`)).json();
      const isFiltered = at("state").value || at("search").value || view.cause !== null;
      at("session-rows").replaceChildren(...seen.sessions.map(sessionRow), ...seen.ended.map((session) => sessionRow({ session })));
      const over = seen.ended.length ? `, ${seen.ended.length} that are over` : "";
      at("matching").textContent =
        `${counted(seen.total, "session")} open${isFiltered ? `, ${seen.matching.toLocaleString()} of them match` : ""}; ` +
        `${seen.sessions.length.toLocaleString()} shown${over}.`;
      at("more-sessions").hidden = seen.sessions.length >= seen.matching || view.limit >= MOST;
    } catch (error) {
      at("matching").textContent = "The guard doesn't say which sessions there are.";
    } finally {
      asking = false;
      if (isToAskAgain) showSessions();
    }
  }

  // Faults

  function faultRow({ record }) {
    return make(
      "tr", {},
      cell("When", { class: "nowrap" }, clock(record.at)),
      cell("Severity", {}, badge(record.severity)),
      cell("What", {}, make("code", {}, record.kind), make("br"), theirs(record.summary)),
      cell("Session", {}, String(record.session.id)),
      cell("Cause", {}, make("button", { type: "button", class: "link", on: () => chooseCause(record.cause) }, String(record.cause))),
    );
  }

  function showFaults() {
    const shown = faults.filter((one) => one.place > view.cleared.place);
    at("fault-rows").replaceChildren(...shown.slice(-SHOWN).reverse().map(faultRow));
    const hidden = faults.length - shown.length;
    at("kept").textContent =
      `${counted(faults.length, "record")} kept here` +
      (shown.length > SHOWN ? `, the latest ${SHOWN} are shown` : "") +
      (hidden ? `, ${hidden.toLocaleString()} hidden since the view was cleared` : "") +
      ". A cause that comes again and again is recorded now and then, and counted always.";
  }

  function placeOf(identifier) {
    return Number(identifier.split(":")[1]) || 0;
  }

  function keep(record, place) {
    if (faults.length && place <= faults[faults.length - 1].place) return;
    faults.push({ record, place, time: Date.parse(record.at) });
    if (faults.length > KEPT) faults = faults.slice(-KEPT);
    const known = causes.find((one) => one.cause === record.cause);
    const spread = record.so_far || { times: 1, sessions: 1, processes: 0 };
    if (known === undefined) {
      causes.push({
        cause: record.cause, fault: record.id, kind: record.kind, severity: record.severity, title: record.kind,
        summary: record.summary, times: spread.times, sessions: spread.sessions, processes: spread.processes,
        first_at: record.at, last_at: record.at,
      });
      causes.sort((one, other) => RANK[one.severity] - RANK[other.severity] || other.times - one.times);
      needsCauses = true;
    } else {
      known.last_at = record.at;
      known.times = Math.max(known.times, spread.times);
    }
  }

  // What is shown when

  let needsCauses = true;
  let isDue = false;
  let areFiguresDue = false;

  function changeFigures() {
    if (areFiguresDue) return; // what was there before comes all at once
    areFiguresDue = true;
    setTimeout(() => {
      areFiguresDue = false;
      if (!view.paused && !document.hidden) showFigures();
    }, 100);
  }

  function change() {
    if (view.paused) {
      view.unseen += 1;
      at("pause").textContent = `Go on (${view.unseen.toLocaleString()} new)`;
      return;
    }
    if (isDue) return;
    isDue = true;
    setTimeout(() => {
      isDue = false;
      if (view.paused) return;
      showCauses();
      showFaults();
    }, 200);
  }

  async function look() {
    if (document.hidden || view.paused) return;
    try {
      if (needsCauses) {
        needsCauses = false;
        causes = (await (await ask("/api/causes")).json()).causes;
        showCauses();
      }
      if (!asking) await showSessions();
    } catch (error) {
      needsCauses = true;
    }
  }

  function begin() {
    at("pause").addEventListener("click", () => {
      view.paused = !view.paused;
      view.unseen = 0;
      at("pause").setAttribute("aria-pressed", String(view.paused));
      at("pause").textContent = view.paused ? "Go on" : "Pause";
      if (!view.paused) {
        showFigures();
        showCauses();
        showFaults();
        needsCauses = true;
        look();
      }
    });
    at("clear").addEventListener("click", () => {
      const latest = faults[faults.length - 1];
      const times = causes.map((cause) => cause.last_at);
      view.cleared = { place: latest === undefined ? 0 : latest.place, at: times.reduce((a, b) => (a > b ? a : b), "") };
      showCauses();
      showFaults();
    });
    at("unclear").addEventListener("click", () => {
      view.cleared = { place: 0, at: "" };
      showCauses();
      showFaults();
    });
    at("filter").addEventListener("submit", (event) => event.preventDefault());
    for (const id of ["state", "order"]) at(id).addEventListener("change", showSessions);
    let typed = null;
    at("search").addEventListener("input", () => {
      clearTimeout(typed);
      typed = setTimeout(showSessions, 250);
    });
    at("of-cause").addEventListener("click", () => chooseCause(null));
    at("more-sessions").addEventListener("click", () => {
      view.limit = Math.min(MOST, view.limit * 2);
      showSessions();
    });
    document.addEventListener("click", (event) => {
      const link = event.target.closest?.("a[href^='#cause-']");
      if (!link) return;
      const item = document.querySelector(`#causes [data-cause="${Number(link.hash.slice(7))}"]`);
      if (item === null) return;
      event.preventDefault();
      item.scrollIntoView({ behavior: "smooth" });
      const button = item.querySelector("button[aria-expanded='false']");
      if (button !== null) button.click();
    });
  }

  async function loadAll() {
    const known = await (await ask("/api/faults?newest=1&limit=1000")).json();
    faults = [];
    const end = placeOf(known.last);
    known.faults.forEach((record, n) => {
      const place = end - known.faults.length + 1 + n;
      faults.push({ record, place, time: Date.parse(record.at) });
    });
    causes = (await (await ask("/api/causes")).json()).causes;
    needsCauses = false;
    view.last = known.last;
    showCauses();
    showFaults();
  }

  function follow() {
    const stream = new EventSource(`/api/events?after=${encodeURIComponent(view.last)}`);
    stream.addEventListener("hello", async (event) => {
      const hello = JSON.parse(event.data);
      status("live", "info");
      const servers = hello.servers.map((one) =>
        `${one.name === null ? "" : `${one.name}: `}on ${one.listening.join(", ")}, in front of PostgreSQL at ${one.address}`);
      at("where").textContent = `pgguard ${hello.version} ${servers.join("; ")}.`;
      at("missing").hidden = hello.missing.length === 0;
      at("missing").textContent = `Some evidence isn't available on this host: ${hello.missing.join(", ")}. pgguard doctor says why.`;
      if (view.run !== null && view.run !== hello.run) {
        // Another guard is there now: what was of the one before is gone.
        view.cleared = { place: 0, at: "" };
        figures = [];
        opened.clear();
        stream.close();
        view.run = hello.run;
        await loadAll();
        follow();
        return;
      }
      view.run = hello.run;
      if (figures.length) figures = [];
    });
    stream.addEventListener("figures", (event) => {
      const one = JSON.parse(event.data);
      one.time = Date.parse(one.at);
      const before = figures[figures.length - 1];
      const times = (set) => set.faults.reduce((sum, fault) => sum + fault.times, 0);
      if (before !== undefined && times(before) !== times(one)) needsCauses = true;
      figures.push(one);
      if (figures.length > 2 * SPAN) figures.shift();
      changeFigures();
    });
    stream.addEventListener("fault", (event) => {
      view.last = event.lastEventId;
      keep(JSON.parse(event.data), placeOf(event.lastEventId));
      change();
    });
    stream.addEventListener("error", () => {
      status(stream.readyState === EventSource.CLOSED ? "away" : "trying again", "warning");
      if (stream.readyState === EventSource.CLOSED) setTimeout(() => start(), 5000);
    });
  }

  async function start() {
    try {
      await loadAll();
      follow();
    } catch (error) {
      status("away", "warning");
      setTimeout(start, 5000);
    }
  }

  begin();
  start().then(look);
  setInterval(look, EVERY);
})();
