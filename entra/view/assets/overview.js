// All traces: heading, summary, filter, sorted list. The list draws only the rows that are in the window.

const LIST_COLUMNS = [
  { key: "name", title: "Trace", of: (trace) => trace.name },
  { key: "reward", title: "Reward", of: (trace) => trace.reward, text: (value) => fixed(value, 3) },
  { key: "tokens", title: "Tokens", of: (trace) => trace.error === null ? trace.tokens : null, text: whole },
  { key: "entropy", title: "Entropy", unit: "nats", of: (trace) => trace.error === null ? trace.entropy : null, text: (value) => fixed(value, 2) },
  { key: "repeated", title: "Repeated", unit: "share", of: (trace) => trace.error === null ? trace.repeated : null, text: share },
];
const FACETS = 4, FACET_VALUES = 12, TAGS = 3;

function heading() {
  document.title = `${data.title} \u00b7 ENTRA`;
  byId("title").textContent = data.title;
  for (const [name, value] of data.facts) {
    const symbol = { lambda: "\u03bb", tau: "\u03c4" }[name] || name;
    byId("facts").append(make("div", {}, make("dt", {}, symbol), make("dd", {}, value)));
  }
}

function summary(shown) {
  const scored = shown.map((index) => traces[index]).filter((trace) => trace.scored);
  const wrong = shown.filter((index) => traces[index].error !== null).length;
  const average = (of, text) => (scored.length ? text(mean(scored.map(of))) : "\u2013");
  const numbers = [
    [whole(shown.length), plural(shown.length, "trace").replace(/^\S+ /, "") + (wrong ? `, ${plural(wrong, "error")}` : "")],
    [average((trace) => trace.reward, (value) => fixed(value, 3)), "mean reward"],
    [average((trace) => trace.tokens, whole), "mean tokens"],
    [average((trace) => trace.repeated, share), "mean share repeated"],
  ];
  byId("summary").replaceChildren(...numbers.map(([value, name]) => make("div", {}, make("dd", {}, value), make("dt", {}, name))));
}

// What one can choose by: columns of a few different values that come twice or more on average.
function facets() {
  const values = new Map(), times = new Map();
  for (const trace of traces) {
    for (const [name, value] of trace.columns) {
      if (!values.has(name)) values.set(name, new Set());
      if (values.get(name).size <= FACET_VALUES) values.get(name).add(value);
      times.set(name, (times.get(name) || 0) + 1);
    }
  }
  const chosen = ([name, set]) => set.size > 1 && set.size <= FACET_VALUES && 2 * set.size <= times.get(name);
  return [...values].filter(chosen).slice(0, FACETS).map(([name, set]) => ({ name, values: [...set].sort(), of: (trace) => (trace.columns.find(([key]) => key === name) || [])[1] }));
}

// How many characters all scored prompts begin with, up to a space: an instruction that says nothing about a row.
function sharedStart() {
  const [first, ...others] = new Set(traces.filter((trace) => trace.error === null).map((trace) => data.prompts[trace.prompt]));
  if (!others.length) return 0;
  let length = first.length;
  for (const other of others) while (!other.startsWith(first.slice(0, length))) length--;
  return Math.max(0, first.lastIndexOf(" ", length), first.slice(0, length).lastIndexOf("\n"));
}

function overview(open) {
  heading();
  const skipped = sharedStart();
  const rows = byId("rows"), found = byId("found"), input = byId("filter");
  const chart = scatter(byId("scatter"), open);
  const choices = facets();
  const state = { order: null, down: false, shown: traces.map((trace) => trace.index), active: 0, run: 0 };
  const drawn = new Map();

  for (const facet of choices) {
    const select = make("select", { change: filter }, make("option", { value: "" }, "all"), ...facet.values.map((value, i) => make("option", { value: i }, value || "(empty)")));
    facet.chosen = () => (select.value === "" ? null : facet.values[select.value]);
    byId("filters").append(make("label", { class: "field" }, facet.name, select));
  }
  if (traces.some((trace) => trace.error !== null)) {
    const select = make("select", { id: "state", change: filter }, ...["all", "scored", "with an error"].map((text) => make("option", {}, text)));
    byId("filters").append(make("label", { class: "field" }, "Rows", select));
    choices.push({ chosen: () => (select.selectedIndex ? select.selectedIndex === 2 : null), of: (trace) => trace.error !== null });
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  input.addEventListener("input", filter);

  const headers = LIST_COLUMNS.map((column) => {
    const button = make("button", { type: "button", click: () => sort(column) }, column.title, ...(column.unit ? [" ", make("small", {}, column.unit)] : []));
    return make("div", { role: "columnheader", "aria-sort": "none", class: column.key }, button);
  });
  byId("columns").append(...headers);

  function sort(column) {
    state.down = state.order === column ? !state.down : column.key !== "name" && column.key !== "reward";
    state.order = column;
    LIST_COLUMNS.forEach((other, i) => headers[i].setAttribute("aria-sort", other !== column ? "none" : state.down ? "descending" : "ascending"));
    arrange();
  }

  // Rows without a value come last, whichever way the others go.
  function arrange() {
    const { order, down } = state;
    const active = state.shown[state.active];
    state.shown.sort((a, b) => {
      const [first, second] = [a, b].map((index) => (order ? order.of(traces[index]) : index));
      if (first === null || second === null) return (first === null) - (second === null) || a - b;
      const difference = typeof first === "string" ? first.localeCompare(second, "en", { numeric: true }) : first - second;
      return (down ? -difference : difference) || a - b;
    });
    state.active = Math.max(0, state.shown.indexOf(active));
    for (const row of drawn.values()) row.remove();
    drawn.clear();
    paint();
  }

  function show(indices, text) {
    state.shown = indices;
    found.textContent = text;
    byId("table").setAttribute("aria-rowcount", indices.length + 1);
    arrange();
    summary(indices);
    chart.show(indices);
  }

  // What stands in the list is looked at first; the completions are read one after the other, and found ones added.
  async function filter() {
    const run = ++state.run;
    const text = input.value.trim().toLowerCase();
    const allowed = traces.filter((trace) => choices.every((facet) => facet.chosen() === null || facet.of(trace) === facet.chosen()));
    const known = (trace) => [trace.name, data.prompts[trace.prompt], trace.error || "", ...trace.columns.flat()].some((part) => part.toLowerCase().includes(text));
    const matches = new Set(allowed.filter((trace) => !text || known(trace)).map((trace) => trace.index));
    const rest = text ? allowed.filter((trace) => !matches.has(trace.index) && trace.tokens) : [];
    const report = (searched) => {
      const count = matches.size === traces.length ? `all ${whole(traces.length)}` : `${whole(matches.size)} of ${whole(traces.length)}`;
      const still = searched < rest.length ? `, searching the completions (${whole(searched)} of ${whole(rest.length)})` : "";
      show([...matches], traces.length ? count + still : "No traces in this page.");
    };
    report(0);
    for (let i = 0; i < rest.length; i++) {
      const completion = await completionOf(rest[i]);
      if (run !== state.run) return;
      if (completion.includes(text)) matches.add(rest[i].index);
      if (i % 100 === 99 || i === rest.length - 1) report(i + 1);
    }
  }

  function row(at) {
    const trace = traces[state.shown[at]];
    const tagged = choices.filter((facet) => facet.name && facet.of(trace)).slice(0, TAGS);
    const tags = tagged.map((facet) => (/^(true|false|null|[\d.-]+)$/.test(facet.of(trace)) ? `${facet.name}: ` : "") + facet.of(trace));
    const about = trace.error ?? (skipped ? "\u2026 " : "") + data.prompts[trace.prompt].slice(skipped, skipped + 300).replace(/\s+/g, " ").trim();
    const cells = LIST_COLUMNS.map((column) => {
      if (column.key === "name") {
        return make("div", { role: "gridcell", class: "name" },
          make("a", { href: address(trace.index), tabindex: -1, class: "title" }, trace.name),
          make("span", { class: trace.error === null ? "about" : "about error" }, ...tags.map((tag) => make("span", { class: "tag" }, tag)), about));
      }
      const value = column.of(trace);
      const cell = make("div", { role: "gridcell", class: column.key }, make("span", { class: "value" }, value === null ? "\u2013" : column.text(value)));
      if (column.key === "repeated" && value !== null) {
        const bar = make("span", { class: "meter" });
        bar.style.setProperty("--part", value);
        cell.append(bar);
      }
      return cell;
    });
    return make("div", { role: "row", class: "row", "aria-rowindex": at + 2, tabindex: at === state.active ? 0 : -1, "data-at": at }, ...cells);
  }

  const height = () => {
    const probe = make("div", { class: "row probe" });
    rows.append(probe);
    const tall = probe.offsetHeight;
    probe.remove();
    return tall;
  };

  // The rows in the window, some more, and the active one, which may hold the focus.
  function paint() {
    const tall = height();
    if (!tall) return;
    const count = state.shown.length;
    rows.style.height = `${tall * count}px`;
    const top = -rows.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(top / tall) - 8);
    const last = Math.min(count - 1, Math.ceil((top + innerHeight) / tall) + 8);
    const wanted = new Set(count ? [state.active] : []);
    for (let at = first; at <= last; at++) wanted.add(at);
    for (const [at, element] of drawn) {
      if (wanted.has(at)) continue;
      element.remove();
      drawn.delete(at);
    }
    for (const at of [...wanted].sort((a, b) => a - b)) {
      if (!drawn.has(at)) {
        const element = row(at);
        const after = [...drawn.keys()].filter((other) => other > at).sort((a, b) => a - b)[0];
        rows.insertBefore(element, after === undefined ? null : drawn.get(after));
        drawn.set(at, element);
      }
      const element = drawn.get(at);
      element.style.transform = `translateY(${at * tall}px)`;
      element.tabIndex = at === state.active ? 0 : -1;
    }
  }

  function activate(at, focus = true) {
    state.active = Math.max(0, Math.min(state.shown.length - 1, at));
    paint();
    const element = drawn.get(state.active);
    if (!element || !focus) return;
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest" });
  }

  rows.addEventListener("click", (event) => {
    const element = event.target.closest(".row");
    if (!element || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    activate(Number(element.dataset.at));
    open(state.shown[state.active]);
  });
  rows.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(innerHeight / height()) - 2);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in moves) activate(state.active + moves[event.key]);
    else if (event.key === "Enter") open(state.shown[state.active]);
    else return;
    event.preventDefault();
  });
  addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  new ResizeObserver(paint).observe(rows);

  filter();
  return {
    // The trace before or after one in the order of the list.
    neighbour(index, step) {
      const at = state.shown.indexOf(index);
      return at < 0 ? null : (state.shown[at + step] ?? null);
    },
    // Back from a trace: its row is the active one.
    comeBack(index) {
      const at = state.shown.indexOf(index);
      activate(at < 0 ? state.active : at);
    },
  };
}
