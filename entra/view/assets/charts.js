// Charts as SVG, drawn at the width that there is, so that text keeps its size.

function ticks(low, high, count, least, [first, last] = [-Infinity, Infinity]) {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = Math.max(least, [1, 2, 5, 10].map((factor) => factor * power).find((size) => span / size <= count * 1.001));
  const marks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) marks.push(k * step);
  return { marks: marks.filter((mark) => mark >= first - step * 1e-9 && mark <= last + step * 1e-9), decimals: Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9))) };
}

const tickText = (value, decimals) => (Math.abs(value) >= 1e6 ? value.toExponential(0).replace("e+", "e") : decimals ? fixed(value, decimals) : whole(value).replace("-", "\u2212"));

// Axes with labels, whole numbers across; returns the drawing and the functions from numbers to places on it. A range has some
// room at its ends; what lies outside of `possible`, such as a length of -1 token, has no tick there.
function axes({ width, height, x, y, label }) {
  const left = 62, right = 22, top = 12, bottom = 44;
  const scale = ([low, high], from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);
  const toX = scale(x.range, left, width - right);
  const toY = scale(y.range, height - bottom, top);
  const picture = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-label": label });
  const across = ticks(...x.range, Math.max(2, Math.floor(width / 70)), 1, x.possible);
  const up = ticks(...y.range, Math.max(2, Math.floor(height / 45)), 0, y.possible);
  for (const mark of up.marks) {
    picture.append(
      draw("line", { class: "grid", x1: left, x2: width - right, y1: toY(mark), y2: toY(mark) }),
      draw("text", { class: "tick", x: left - 8, y: toY(mark) + 4, "text-anchor": "end" }, tickText(mark, up.decimals)),
    );
  }
  for (const mark of across.marks) {
    picture.append(draw("text", { class: "tick", x: toX(mark), y: height - bottom + 18, "text-anchor": "middle" }, tickText(mark, across.decimals)));
  }
  picture.append(
    draw("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    draw("text", { class: "label", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x.label),
    draw("text", { class: "label", transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label),
  );
  return { picture, toX, toY, left, right: width - right, top, bottom: height - bottom };
}

// Calls paint(width) now and whenever the width changes.
function atEveryWidth(element, paint) {
  let before = 0;
  new ResizeObserver(() => {
    const width = Math.floor(element.clientWidth);
    if (width > 0 && width !== before) element.replaceChildren(paint((before = width)));
  }).observe(element);
}

function padded(low, high, least) {
  const room = Math.max((high - low) * 0.06, least);
  return [low - room, high + room];
}

// Reward against length. `shown` are the traces that pass the filter; the others stay, faintly.
function scatter(figure, open) {
  const plot = figure.querySelector(".plot");
  const reading = figure.querySelector(".reading");
  const points = traces.filter((trace) => trace.scored).sort((a, b) => a.tokens - b.tokens || a.index - b.index);
  if (!points.length) {
    plot.append(make("p", { class: "empty" }, "No scored trace to draw."));
    return { show() {} };
  }
  const lengths = points.map((trace) => trace.tokens), rewards = points.map((trace) => trace.reward);
  const circles = new Map();
  let frame = null, chosen = null, shown = new Set(points.map((trace) => trace.index));

  const choose = (trace) => {
    circles.get(chosen)?.classList.remove("chosen");
    chosen = trace ? trace.index : null;
    circles.get(chosen)?.classList.add("chosen");
    reading.replaceChildren(...(trace ? [make("bdi", {}, trace.name), `: reward ${fixed(trace.reward, 3)}, ${plural(trace.tokens, "token")}`] : []));
  };
  const nearest = (event) => {
    const box = frame.picture.getBoundingClientRect();
    let best = null, distance = 24;
    for (const trace of points) {
      if (!shown.has(trace.index)) continue;
      const far = Math.hypot(frame.toX(trace.tokens) - (event.clientX - box.left), frame.toY(trace.reward) - (event.clientY - box.top));
      if (far < distance) [best, distance] = [trace, far];
    }
    return best;
  };
  const step = (event) => {
    const inside = points.filter((trace) => shown.has(trace.index));
    const at = inside.findIndex((trace) => trace.index === chosen);
    const moves = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: inside.length - 1 };
    if (event.key in moves && inside.length) {
      choose(inside[Math.max(0, Math.min(inside.length - 1, moves[event.key]))]);
      event.preventDefault();
    } else if (event.key === "Enter" && chosen !== null) open(chosen);
  };

  atEveryWidth(plot, (width) => {
    frame = axes({
      width,
      height: Math.max(240, Math.min(300, width * 0.5)),
      x: { label: "completion length (tokens)", range: padded(Math.min(...lengths), Math.max(...lengths), 2), possible: [0, Infinity] },
      y: { label: "reward (0 to 1)", range: padded(Math.min(...rewards), Math.max(...rewards), 0.005), possible: [0, 1] },
      label: "Reward against completion length, one point per trace; arrow keys move from point to point, Enter opens the trace",
    });
    for (const trace of points) {
      const circle = draw("circle", { class: "point", cx: frame.toX(trace.tokens), cy: frame.toY(trace.reward), r: 5, "data-trace": trace.index });
      circles.set(trace.index, circle);
      circle.classList.toggle("chosen", trace.index === chosen);
      circle.classList.toggle("faint", !shown.has(trace.index));
      frame.picture.append(circle);
    }
    filled(frame.picture, {
      tabindex: 0,
      role: "application",
      keydown: step,
      focus: () => chosen === null && choose(points.find((trace) => shown.has(trace.index))),
      pointermove: (event) => choose(nearest(event)),
      pointerleave: () => choose(null),
      click: (event) => {
        const trace = nearest(event);
        if (trace) open(trace.index);
      },
    }, []);
    return frame.picture;
  });
  figure.querySelector("figcaption").textContent =
    `Reward of each of the ${plural(points.length, "scored trace")} against the number of its tokens. A trace far below others of its length repeats itself more than they do. Click a point to open its trace.`;
  return {
    show(indices) {
      shown = new Set(indices);
      for (const [index, circle] of circles) circle.classList.toggle("faint", !shown.has(index));
    },
  };
}

// Importance over position: the median of each stretch of tokens, and the band from the 10th to the 90th percentile.
function overPosition(trace, tokens, jump) {
  const finite = [...tokens.importance.keys()].filter((i) => Number.isFinite(tokens.importance[i]));
  const plot = make("div", { class: "plot" });
  const caption = make("figcaption", {});
  const figure = make("figure", { class: "chart positions" }, make("h3", {}, "Importance over position"), plot, caption);
  const marks = { occurrences: null, cursor: null };
  if (!finite.length) {
    plot.append(make("p", { class: "empty" }, "No finite importance to draw."));
    return { figure, mark() {} };
  }
  const stretch = Math.max(1, Math.ceil(trace.tokens / 120));
  const bins = [];
  for (let first = 0; first < trace.tokens; first += stretch) {
    const values = Array.from(tokens.importance.subarray(first, first + stretch)).filter(Number.isFinite).sort((a, b) => a - b);
    const at = (part) => values[Math.round(part * (values.length - 1))];
    if (values.length) bins.push({ x: first + 1 + (Math.min(stretch, trace.tokens - first) - 1) / 2, low: at(0.1), middle: at(0.5), high: at(0.9) });
  }
  const y = padded(Math.min(...bins.map((bin) => bin.low)), Math.max(...bins.map((bin) => bin.high)), 0.01);
  let frame = null, marked = null, chosen = 0;
  const line = (points) => "M" + points.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join("L");
  const paintMarks = () => {
    if (!frame || !marked) return;
    marks.occurrences.setAttribute("d", marked.all.map((i) => `M${frame.toX(i + 1).toFixed(1)} ${frame.bottom}v-9`).join(""));
    marks.cursor.setAttribute("d", marked.at === null ? "" : `M${frame.toX(marked.at + 1).toFixed(1)} ${frame.top}V${frame.bottom}`);
  };
  atEveryWidth(plot, (width) => {
    frame = axes({
      width,
      height: 230,
      x: { label: "position (tokens from the start)", range: [1, Math.max(2, trace.tokens)], possible: [1, trace.tokens] },
      y: { label: `importance (nats)`, range: y },
      label: `Importance over position in ${trace.name}; arrow keys choose a position, Enter goes there`,
    });
    const place = (key) => bins.map((bin) => [frame.toX(bin.x), frame.toY(bin[key])]);
    if (bins.length > 1) {
      if (stretch > 1) frame.picture.append(draw("path", { class: "band", d: line([...place("high"), ...place("low").reverse()]) + "Z" }));
      frame.picture.append(draw("path", { class: "line", d: line(place("middle")) }));
    } else frame.picture.append(draw("circle", { class: "point", cx: place("middle")[0][0], cy: place("middle")[0][1], r: 4 }));
    marks.occurrences = draw("path", { class: "occurrence" });
    marks.cursor = draw("path", { class: "cursor" });
    frame.picture.append(marks.occurrences, marks.cursor);
    const inside = (i) => Math.max(0, Math.min(trace.tokens - 1, i));
    const choose = (i) => {
      chosen = inside(i);
      frame.picture.setAttribute("aria-valuenow", chosen + 1);
      marks.cursor.setAttribute("d", `M${frame.toX(chosen + 1).toFixed(1)} ${frame.top}V${frame.bottom}`);
    };
    filled(frame.picture, {
      tabindex: 0,
      role: "slider",
      "aria-valuemin": 1,
      "aria-valuemax": trace.tokens,
      "aria-valuenow": chosen + 1,
      keydown: (event) => {
        const moves = { ArrowRight: chosen + stretch, ArrowUp: chosen + stretch, ArrowLeft: chosen - stretch, ArrowDown: chosen - stretch, Home: 0, End: trace.tokens - 1 };
        if (event.key in moves) {
          choose(moves[event.key]);
          event.preventDefault();
        } else if (event.key === "Enter") jump(chosen);
      },
      click: (event) => {
        const part = (event.clientX - frame.picture.getBoundingClientRect().left - frame.left) / (frame.right - frame.left);
        jump(inside(Math.round(part * (trace.tokens - 1))));
      },
    }, []);
    paintMarks();
    return frame.picture;
  });
  caption.textContent =
    (stretch > 1
      ? `Line: median importance of each ${stretch} neighbouring tokens of the ${whole(trace.tokens)} in this trace; band: from their 10th to their 90th percentile.`
      : `Importance of each of the ${plural(trace.tokens, "token")} in this trace.`) +
    " Importance is log-probability (times its weight, where the heading names one) + \u03bb \u00d7 attention from later tokens. Ticks: where the marked token occurs. Click to go there, or choose a position with the arrow keys and press Enter.";
  return {
    figure,
    mark(at, all) {
      marked = { at, all };
      if (at !== null) frame?.picture.setAttribute("aria-valuenow", (chosen = at) + 1);
      paintMarks();
    },
  };
}

// The most repeated runs of `length` tokens as bars; a click marks them in the text.
function bars(trace, length, mark) {
  const runs = trace.runs[length];
  const single = length === 1;
  const list = make("ol", { class: "bars" });
  const most = Math.max(1, ...runs.map(([, times]) => times));
  for (const [words, times] of runs) {
    const text = visible(words.map((word) => data.texts[word]).join(""));
    const bar = make("span", { class: "fill" });
    bar.style.setProperty("--part", times / most);
    list.append(
      make("li", {}, make("button", { type: "button", class: "run", title: text, click: () => mark(words) },
        make("span", { class: "run-text" }, text), make("span", { class: "track" }, bar), make("span", { class: "times" }, whole(times)))),
    );
  }
  const what = single ? "token among the low-importance ones" : `run of ${length} tokens in the whole text`;
  if (!runs.length) return make("div", {}, make("p", { class: "empty" }, `No ${what} comes twice.`));
  return make("div", {}, list, make("p", { class: "axis-label" }, `occurrences of the ${what} (times)`));
}

function repeats(trace, mark) {
  const lengths = Object.keys(trace.runs).map(Number).filter((length) => length > 1);
  const area = make("div", {});
  const buttons = lengths.map((length) => make("button", { type: "button", click: () => choose(length) }, `${length} tokens`));
  function choose(length) {
    area.replaceChildren(bars(trace, length, mark));
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", lengths[i] === length));
  }
  choose(4);
  return [
    make("figure", { class: "chart repeats-1" }, make("h3", {}, "Most repeated tokens"), bars(trace, 1, mark),
      make("figcaption", {}, `The token types that come most often among the ${plural(trace.counted, "low-importance token")} of this trace, those that the reward counts.`)),
    make("figure", { class: "chart repeats-n" }, make("h3", {}, "Most repeated runs"),
      make("div", { class: "choice", role: "group", "aria-label": "Length of the runs" }, ...buttons), area,
      make("figcaption", {}, `The runs of neighbouring tokens that come most often among all ${plural(trace.tokens, "token")} of this trace. Runs may overlap. Click one to mark it in the text.`)),
  ];
}
