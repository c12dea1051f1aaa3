// One trace, or two of one prompt side by side: their text token by token, the card of the token that is looked at, charts.

// Text is laid out in blocks that the browser may leave out while they are outside the window; they end at a line's end.
const BLOCK = 400, LONGEST_BLOCK = 1600;

// The classes of a token by its mark: 1 for protected, 2 more for the first of a run of them, 4 more for the last.
const ALONE = 7;
const outline = (mark) => (mark ? " p" : "") + (mark & 2 ? " first" : "") + (mark & 4 ? " last" : "");

// How a label is shown, beside shades and outlines: a letter where it begins, and a strip under its tokens, whose color and
// pattern it shares with no other of the first 28.
const letterOf = (label) => (label < 26 ? String.fromCharCode(65 + label) : String(label + 1));
const stripOf = (label) => `mk c${label % 7} d${label % 4}`;
const isPlace = ([, , , start, end]) => start === end;

function markText([label, , , start, end]) {
  return `${data.labels[label]} (character${start === end ? "" : "s"} ${whole(start)}${start === end ? "" : ` to ${whole(end)}`})`;
}

// The labels of a trace with their numbers of marks; a click goes to the next one.
function keysOf(trace, jump) {
  const counts = new Map();
  for (const mark of trace.marked) counts.set(mark[0], (counts.get(mark[0]) || []).concat([mark]));
  if (!counts.size) return [];
  const buttons = [...counts].sort(([a], [b]) => a - b).map(([label, marks]) => {
    const name = data.labels[label];
    const count = marks.length === 1 ? markText(marks[0]).slice(name.length + 1) : whole(marks.length);
    return make("button", { type: "button", class: "quiet key", title: "Go to the next one", click: () => jump(label) },
      make("span", { class: `letter ${stripOf(label)}` }, marks.every(isPlace) ? "\u25bc" : letterOf(label)), make("bdi", {}, name), make("small", {}, count));
  });
  return [make("div", { class: "keys", role: "group", "aria-label": `Marks of ${trace.name}` }, make("span", { class: "legend-name" }, "Marks"), ...buttons)];
}

function legend(keys) {
  const classes = data.edges.length + 1;
  const scale = make("div", { class: "scale" });
  for (let number = 0; number < classes; number++) {
    const edge = number ? fixed(data.edges[number - 1], 2) : "lowest";
    scale.append(make("span", { class: `swatch s${shadeOfClass(number)}` }, edge));
  }
  byId("legend").replaceChildren(
    make("span", { class: "legend-name" }, "Importance, from (nats)"),
    scale,
    make("span", { class: "legend-key" }, make("span", { class: `t s6${outline(ALONE)}` }, "protected"), " outlined: the reward does not look at it"),
    make("span", { class: "legend-key" }, make("span", { class: "t s0 same" }, "same"), " the marked token again"),
    ...keys,
  );
}

// Whether a text ends in letters that are written from right to left; `before` it where it has no letters.
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

function goesLeft(text, before) {
  const letters = text.match(/\p{L}/gu);
  return letters ? RIGHT_TO_LEFT.test(letters.at(-1)) : before && !text.includes("\n");
}

// The text of a trace; `looked(i)` is called when a token comes under the pointer or into focus, `left()` when the pointer goes.
function textOf(trace, tokens, looked, left) {
  const n = trace.tokens;
  const spans = new Array(n);
  const text = make("div", { class: "text", role: "group", "aria-label": `Completion of ${trace.name}, ${plural(n, "token")}. Arrow keys move from token to token, n and p to the same token again${trace.marked.length ? ", m and Shift+M to the next and the previous mark" : ""}.` });
  const begin = new Map(), inside = new Array(n).fill(null);
  for (const mark of trace.marked) {
    if (!begin.has(mark[1])) begin.set(mark[1], []);
    begin.get(mark[1]).push(mark);
    if (!isPlace(mark)) inside.fill(mark, mark[1], mark[2] + 1);  // of marks in each other the inner one, which comes later
  }
  let block = null, inBlock = 0, leftwards = false;
  for (let i = 0; i < n; i++) {
    const piece = data.texts[tokens.words[i]];
    leftwards = goesLeft(piece, leftwards);
    const span = document.createElement("span");
    span.className =
      `t s${shadeOf(tokens.importance[i])}` +
      outline(tokens.marks[i]) +
      (leftwards ? " rtl" : "") +
      (inside[i] ? ` ${stripOf(inside[i][0])}` : "") +
      (piece.includes("\n") ? " line" : piece === "" ? " part" : "");
    span.textContent = piece;
    const shapeless = piece.match(SHAPELESS);
    if (shapeless) {  // the text stays what it is; a sign stands before it, and it moves nothing outside of its token
      span.classList.add("shapeless");
      span.dataset.sign = shapeless.map(signOf).join("");
    }
    span.tabIndex = -1;
    span.at = i;
    spans[i] = span;
    if (!block) text.append((block = make("div", { class: "block" })));
    for (const mark of begin.get(i) || []) {
      const sign = isPlace(mark) ? `\u25bc ${data.labels[mark[0]]}` : letterOf(mark[0]);
      block.append(make("span", { class: `letter ${stripOf(mark[0])}${isPlace(mark) ? " place" : ""}`, "data-sign": sign, title: data.labels[mark[0]], "aria-hidden": "true" }));
    }
    block.append(span);
    inBlock++;
    if ((inBlock >= BLOCK && piece.endsWith("\n")) || inBlock >= LONGEST_BLOCK) [block, inBlock] = [null, 0];
  }
  if (!n) text.append(make("p", { class: "empty" }, "No tokens."));

  let at = 0, marked = [], looking = false;
  const idAt = (i) => data.ids[tokens.words[i]];
  // Marks every run of these words.
  function mark(words) {
    for (const span of marked) span.classList.remove("same");
    marked = [];
    const starts = [];
    for (let i = 0; i + words.length <= n; i++) {
      if (!words.every((word, k) => data.ids[word] === idAt(i + k))) continue;
      starts.push(i);
      for (let k = 0; k < words.length; k++) marked.push(spans[i + k]);
    }
    for (const span of marked) span.classList.add("same");
    return starts;
  }
  function focus(i = at) {
    spans[at].tabIndex = -1;
    at = Math.max(0, Math.min(n - 1, i));
    spans[at].tabIndex = 0;
    spans[at].focus({ preventScroll: true });
    show(4);
  }
  // A block outside the window has an estimated height. Once it is drawn it may push the token out of the window, so look again.
  function show(frames) {
    spans[at].scrollIntoView({ block: "nearest" });
    if (frames) requestAnimationFrame(() => show(frames - 1));
  }
  // The token that stands above or below.
  function vertically(step) {
    const here = spans[at].getClientRects()[0];
    let line = null, best = at, distance = Infinity;
    for (let i = at + step; i >= 0 && i < n; i += step) {
      const there = spans[i].getClientRects()[0];
      if (!there || Math.abs(there.top - here.top) < 4) continue;
      if (line === null) line = there.top;
      if (Math.abs(there.top - line) > 4) break;
      const far = Math.abs(there.left - here.left);
      if (far < distance) [best, distance] = [i, far];
    }
    return best;
  }
  function again(step) {
    for (let i = at + step; i >= 0 && i < n; i += step) if (idAt(i) === idAt(at)) return i;
    return at;
  }
  // The token where the next mark begins, or the previous one; of a label, or of any. After the last one comes the first.
  function begins(step, label = null) {
    const starts = trace.marked.filter((mark) => label === null || mark[0] === label).map((mark) => mark[1]);
    if (step < 0) starts.reverse();
    return starts.find((start) => (start - at) * step > 0 || (start === at && !looking)) ?? starts[0] ?? at;
  }
  if (n) spans[0].tabIndex = 0;
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.classList.contains("t")) return;
    const moves = {
      ArrowRight: () => at + 1, ArrowLeft: () => at - 1, ArrowDown: () => vertically(1), ArrowUp: () => vertically(-1),
      Home: () => 0, End: () => n - 1, PageDown: () => at + 100, PageUp: () => at - 100, n: () => again(1), p: () => again(-1),
      m: () => begins(1), M: () => begins(-1),
    };
    if (!(event.key in moves)) return;
    focus(moves[event.key]());
    event.preventDefault();
  });
  text.addEventListener("pointerover", (event) => event.target.at !== undefined && looked(event.target.at));
  text.addEventListener("pointerleave", left);
  text.addEventListener("focusin", (event) => {
    if (event.target.at === undefined) return;
    spans[at].tabIndex = -1;
    at = event.target.at;
    looking = true;
    spans[at].tabIndex = 0;
    looked(at, true);
  });
  text.addEventListener("click", (event) => event.target.at !== undefined && getSelection().isCollapsed && spans[event.target.at].focus());
  return { text, mark, focus, jump: (label) => focus(begins(1, label)) };
}

// What is known of one token. The same for the pointer and for the keyboard.
function card(trace, tokens, i, alone) {
  const box = byId("card");
  if (i === null) {
    box.replaceChildren(make("p", { class: "empty" }, "Point at a token, or go through the text with the arrow keys. N and P find the same token again."));
    return;
  }
  const id = data.ids[tokens.words[i]];
  const importance = tokens.importance[i];
  const count = tokens.counts.get(id) || 0;
  const facts = [
    ["log-prob", fixed(tokens.logprobs[i], data.decimals.logprobs), "nats"],
    [data.attention, fixed(tokens.incoming[i], data.decimals.incoming), ""],
    ["importance", fixed(importance, data.decimals.importance), "nats"],
    ["among the low-importance ones", whole(count), `of ${whole(trace.counted)}`],
  ];
  box.replaceChildren(
    make("p", { class: "token" }, make("span", { class: `t s${shadeOf(importance)}${outline(tokens.marks[i] && ALONE)}` }, visible(data.texts[tokens.words[i]]))),
    make("p", { class: "where" }, `${alone ? "" : `${trace.name}, `}token ${whole(i + 1)} of ${whole(trace.tokens)}, id ${id}`),
    make("dl", {}, ...facts.map(([name, value, unit]) => make("div", {}, make("dt", {}, name), make("dd", {}, value, ...(unit ? [" ", make("small", {}, unit)] : []))))),
    make("p", { class: "state" }, tokens.marks[i] ? "Protected: the reward does not look at it." : data.ngram > 1 ? `The reward counts the ${data.ngram}-gram that ends here.` : count > 1 ? "Counted by the reward; it repeats." : "Counted by the reward; it does not repeat."),
    ...trace.marked.filter((mark) => mark[1] <= i && i <= mark[2]).map((mark) => make("p", { class: "state mark" },
      make("span", { class: `letter ${stripOf(mark[0])}` }, isPlace(mark) ? "\u25bc" : letterOf(mark[0])), make("bdi", {}, markText(mark)))),
  );
}

function numbers(trace, other) {
  return make("dl", { class: "numbers" }, ...LIST_COLUMNS.slice(1).map((column) => {
    const [value, before] = [column.of(trace), other ? column.of(other) : null];
    const sign = (text) => (text.startsWith("\u2212") || text.startsWith("-") ? text.replace("-", "\u2212") : `+${text}`);
    const change = value !== null && before !== null ? [" ", make("small", { class: "change" }, sign(column.text(value - before)))] : [];
    return make("div", {}, make("dt", {}, column.title), make("dd", {}, value === null ? "\u2013" : column.text(value), ...change));
  }));
}

function promptOf(trace) {
  const prompt = data.prompts[trace.prompt];
  return make("details", prompt.length <= 400 ? { class: "prompt", open: "" } : { class: "prompt" }, make("summary", {}, "Prompt"), make("p", {}, prompt || "(empty)"));
}

// `texts` are those of all panes: what is marked in one is marked in all.
async function pane(trace, other, alone, texts) {
  const columns = make("dl", { class: "facts" }, ...trace.columns.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  const parts = [make("h2", { tabindex: -1 }, trace.name), numbers(trace, other), columns, promptOf(trace)];
  if (trace.error !== null) return { article: make("article", { class: "pane" }, ...parts, make("p", { class: "notice" }, trace.error)), charts: [], focus: null, keys: [] };

  const tokens = await readTokens(trace);
  let position = null, kept = null;
  const mark = (words, at) => {
    for (const text of texts) text.show(words, text === own ? at : null);
  };
  const look = (i, keep = false) => {
    if (keep) kept = i;
    card(trace, tokens, i, alone);
    mark([tokens.words[i]], i);
  };
  const body = textOf(trace, tokens, look, () => kept !== null && look(kept));
  position = overPosition(trace, tokens, (i) => body.focus(i));
  const own = { show: (words, at) => position.mark(at, body.mark(words)) };
  texts.push(own);
  const markRun = (words) => {
    const starts = body.mark(words);
    body.focus(starts.find((i) => words.length > 1 || !tokens.marks[i]) ?? starts[0]);
    mark(words, starts[0]);
  };
  const charts = trace.tokens ? [position.figure, ...repeats(trace, markRun)] : [];
  if (trace.reward === null) parts.push(make("p", { class: "notice" }, "No reward: a log-probability or an attention of this trace is not finite."));
  for (const fault of trace.leftOut) parts.push(make("p", { class: "notice" }, fault));
  const keys = keysOf(trace, body.jump);
  return { article: make("article", { class: "pane" }, ...parts, ...(alone ? [] : keys), body.text), charts, focus: trace.tokens ? body.focus : null, keys };
}

// Draws the view. False when a later call came while this one was reading; else what puts the focus on a token of the first
// trace, by default on the one that had it last, or the first of all; null where it has none.
let viewing = 0;

async function view(first, second, list) {
  const run = ++viewing;
  const trace = traces[first], other = second === null ? null : traces[second];
  const texts = [];
  const panes = await Promise.all([pane(trace, null, !other, texts), ...(other ? [pane(other, trace, false, texts)] : [])]);
  if (run !== viewing) return false;
  legend(other ? [] : panes[0].keys);
  byId("stage").classList.toggle("double", Boolean(other));
  byId("panes").replaceChildren(...panes.map(({ article, charts }) => {
    if (other) article.append(...charts);
    return article;
  }));
  byId("charts").replaceChildren(...(other ? [] : panes[0].charts));
  card(null, null, null);
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    const index = list.neighbour(first, step);
    const link = byId(id);
    if (index === null) link.removeAttribute("href");
    else link.href = address(index);
    link.title = index === null ? "" : traces[index].name;
  }
  const twins = traces.filter((twin) => twin.prompt === trace.prompt && data.prompts[trace.prompt] !== "" && twin.index !== first);
  const select = byId("versus");
  select.replaceChildren(
    make("option", { value: "" }, twins.length ? "choose one of the same prompt" : "no other of this prompt"),
    ...twins.map((twin) => make("option", { value: twin.index }, twin.name + (twin.reward === null ? "" : `, reward ${fixed(twin.reward, 3)}`))),
  );
  select.disabled = !twins.length;
  select.value = other ? String(second) : "";
  return { focus: panes[0].focus };
}
