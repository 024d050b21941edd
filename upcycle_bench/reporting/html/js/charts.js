/* Charts as SVG by Observable Plot. Their colours are variables of the style sheet, so dark mode and print need no more. */

const SERIES = 8; // colours of curves; further strategies are grey
const COLOURS = { better: "var(--better)", worse: "var(--worse)", reference: "var(--accent)" };

/** A chart of Plot's that the content security policy allows: its own style element stands in style.css instead. */
function draw(label, options) {
  const chart = Plot.plot({ className: "plot", ...options });
  chart.querySelectorAll("style").forEach((each) => each.remove());
  chart.setAttribute("aria-hidden", "true"); // a picture with one name: its parts are for eyes only
  return element("div", { role: "img", "aria-label": label }, chart);
}

/** Characters of the longest name, at most so many. */
function nameRoom(names, most) {
  return Math.max(8, Math.floor(Math.min(most, Math.max(...names.map((name) => name.length)))));
}

/** The axis that names the rows, and the room it takes. */
function nameAxis(rows, width) {
  const characters = nameRoom(rows.map(({ name }) => name), Math.min(34, width / 16));
  return {
    marginLeft: 16 + 6.5 * characters,
    y: { domain: rows.map((_, place) => place), label: null, tickSize: 0,
      tickFormat: (place) => shortened(rows[place].name, characters) },
  };
}

function points(rows, { name }) {
  return rows.map((row, place) => ({ row, place, ...row.headlines[name] })).filter((each) => each.mean !== undefined);
}

function colour({ verdict }) {
  return COLOURS[verdict] ?? "var(--neutral)";
}

function told({ row, mean, half, n, verdict }) {
  return `${row.title}\n${shown(mean)}${half === null ? "" : ` ± ${shown(half)}`}, n=${n}: ${verdict}`;
}

/** Scores with 95 % intervals; the better side is on the right. */
function scoreChart(rows, headline, width) {
  const found = points(rows, headline);
  if (!found.length) return null;
  const reference = found.filter(({ row }) => row.isReference);
  return draw(`${headline.name} with 95 % intervals`, {
    width, height: 56 + 24 * rows.length, ...nameAxis(rows, width), marginRight: 16,
    x: { label: `${headline.name}, right is better`, labelArrow: "none", reverse: !headline.higher, grid: true, nice: true,
      ticks: Math.max(2, width / 140) },
    marks: [
      Plot.ruleX(reference, { x: "mean", stroke: "var(--accent)", strokeDasharray: "3,3" }),
      Plot.ruleY(found.filter(({ half }) => half !== null), { y: "place", x1: (d) => d.mean - d.half,
        x2: (d) => d.mean + d.half, stroke: colour, strokeWidth: 2 }),
      Plot.dot(found, { x: "mean", y: "place", r: 4.5, stroke: colour, strokeWidth: 2, fill: "var(--plot-background)" }),
      Plot.dot(found.filter(({ half }) => half !== null), { x: "mean", y: "place", r: 4.5, fill: colour }),
      Plot.tip(found, Plot.pointer({ x: "mean", y: "place", title: told })),
    ],
  });
}

/** Score against cost; the line joins those that nothing cheaper beats. */
function costChart(rows, headline, width) {
  const relative = rows.some((row) => row.ratio !== null);
  const cost = ({ row }) => (relative ? row.ratio : row.flops);
  const found = points(rows, headline).filter((each) => cost(each) !== null);
  if (!found.length) return null;
  const better = (one, other) => (headline.higher ? one.mean > other.mean : one.mean < other.mean);
  const cheapest = [...found].sort((one, other) => cost(one) - cost(other) || (better(one, other) ? -1 : 1));
  const front = cheapest.filter((each, place) => cheapest.slice(0, place).every((other) => better(each, other)));
  const [most, low, high] = [Math.max(...found.map(cost)), ...d3.extent(found, ({ mean }) => mean)];
  const labelled = []; // of the front, those with room
  for (const each of [...front].reverse()) {
    const near = (other) => Math.abs(cost(each) - cost(other)) < 0.4 * most && Math.abs(each.mean - other.mean) < 0.08 * (high - low);
    if (!labelled.some(near)) labelled.push(each);
  }
  const nameOf = ({ row }) => shortened(row.name, 24);
  const fitsLeft = (each) => 6.5 * nameOf(each).length < 60 + (width - 114) * (cost(each) / (most || 1));
  return draw(`${headline.name} against charged FLOPs`, {
    width, height: 300, marginLeft: 60, marginRight: 30, marginTop: 30, inset: 12,
    x: { label: relative ? "charged FLOPs, by the reference's" : "charged FLOPs", zero: true, labelArrow: "none",
      ticks: Math.max(2, width / 120), tickFormat: relative ? undefined : "~s" },
    y: { label: `${headline.name}, up is better`, labelArrow: "none", reverse: !headline.higher, grid: true, nice: true },
    marks: [
      Plot.line(front, { x: cost, y: "mean", curve: "step-after", stroke: "var(--accent)", strokeOpacity: 0.7 }),
      Plot.ruleX(found.filter(({ half }) => half !== null), { x: cost, y1: (d) => d.mean - d.half,
        y2: (d) => d.mean + d.half, stroke: colour }),
      Plot.dot(found, { x: cost, y: "mean", r: 4.5, fill: colour }),
      ...[true, false].map((fits) => Plot.text(labelled.filter((d) => fitsLeft(d) === fits), { x: cost, y: "mean",
        text: nameOf, dy: -12, textAnchor: fits ? "end" : "start" })),
      Plot.tip(found, Plot.pointer({ x: cost, y: "mean",
        title: (d) => `${told(d)}\n${shown(cost(d))}${relative ? "x" : " FLOPs"}` })),
    ],
  });
}

/** Values over steps, a line for each run: as they are, or thin and, as means of neighbours, thick. */
function curveChart(rows, shared, width, { of, label, smooth }) {
  const lines = rows.flatMap((row, place) => row[of].map(([steps, values]) => ({
    title: row.title, stroke: place < SERIES ? `var(--series-${place + 1})` : "var(--neutral)",
    points: shared[steps].map((step, at) => ({ step, value: values[at] })),
  })));
  if (!lines.length) return null;
  const window = smooth ? Math.max(1, Math.round(Math.max(...lines.map((line) => line.points.length)) / 10)) : 1;
  return draw(`${label} over steps`, {
    width, height: 300, marginLeft: 60, marginRight: 20, marginTop: 30,
    x: { label: "step", labelArrow: "none", ticks: Math.max(2, width / 120) },
    y: { label, labelArrow: "none", grid: true, nice: true },
    marks: lines.reverse().flatMap(({ points: found, stroke, title }) => [
      smooth ? Plot.line(found, { x: "step", y: "value", stroke, strokeOpacity: 0.2, strokeWidth: 1 }) : null,
      Plot.line(found, Plot.windowY({ k: window }, { x: "step", y: "value", stroke, strokeWidth: 1.8, title: () => title })),
    ]),
  });
}

/** Differences to the reference, a line for each dataset; seven classes of colour, at fractions of the largest. */
function heatMap(rows, headline, width) {
  const sign = headline.higher ? 1 : -1;
  const cells = rows.flatMap((row, place) => (row.differences[headline.name] ?? []).map((difference, part) =>
    ({ place, part, title: row.title, difference, gain: difference === null ? null : sign * difference })))
    .filter(({ difference }) => difference !== null);
  const largest = Math.max(0, ...cells.map(({ gain }) => Math.abs(gain)));
  if (largest === 0) return null;
  const thresholds = [-1 / 2, -1 / 8, -1 / 32, 1 / 32, 1 / 8, 1 / 2].map((share) => share * largest);
  const left = 16 + 6.5 * nameRoom(headline.parts, Math.min(width, 800) / 14);
  const above = 16 + 6.5 * nameRoom(rows.map(({ name }) => name), 24);
  const cell = Math.max(16, Math.min(48, (width - left - 10) / rows.length));
  const chart = draw(`${headline.name}: difference to the reference by dataset`, {
    width: left + 10 + cell * rows.length, height: above + 10 + 20 * headline.parts.length,
    marginLeft: left, marginRight: 10, marginTop: above, marginBottom: 10, padding: 0.05,
    x: { type: "band", domain: rows.map((_, place) => place), axis: "top", label: null, tickRotate: -90, tickSize: 0,
      tickFormat: (place) => shortened(rows[place].name, 24) },
    y: { type: "band", domain: headline.parts.map((_, part) => part), label: null, tickSize: 0,
      tickFormat: (part) => shortened(headline.parts[part], nameRoom(headline.parts, Math.min(width, 800) / 14)) },
    color: { type: "threshold", domain: thresholds, range: [1, 2, 3, 4, 5, 6, 7].map((step) => `var(--heat-${step})`) },
    marks: [
      Plot.cell(cells, { x: "place", y: "part", fill: "gain" }),
      Plot.tip(cells, Plot.pointer({ x: "place", y: "part", title: ({ title, part, difference }) =>
        `${title}\n${headline.parts[part]}\n${difference > 0 ? "+" : ""}${shown(difference)}` })),
    ],
  });
  return { chart, thresholds };
}
