/* The figures below a table: charts with their captions and keys. They show the rows that the table shows. */

const MOST = 60; // rows in a chart

/** Returns `show(places)`, which draws the figures of those rows into the section. */
function makeFigures(section, board, shared) {
  const place = section.querySelector(".charts");
  const where = section.querySelector("h2").textContent;
  let rows = [];
  let width = 0;

  function render() {
    width = place.clientWidth;
    const shownRows = rows.slice(0, MOST);
    const note = rows.length > MOST ? ` The first ${MOST} of ${rows.length} rows.` : "";
    const scored = shownRows.filter((row) => Object.keys(row.headlines).length);
    const wide = width > 800 ? (width - 24) / 2 : width;
    place.replaceChildren(...(scored.length ? [
      ...board.headlines.map((headline) => figure(where, `${headline.name}, with 95 % intervals`,
        "A hollow dot has one training seed and no interval. The dashed line is the reference." + note,
        scoreChart(scored, headline, wide))),
      ...board.headlines.map((headline) => figure(where, `${headline.name} against cost`,
        "The line joins strategies that none with fewer charged FLOPs beats, by means: neighbours may be tied." + note,
        costChart(scored, headline, wide))),
      ...board.headlines.filter(({ ranking }) => ranking).map((headline) => figure(where,
        `${headline.name}: critical differences of ranks`, headline.ranking.said + note, rankChart(scored, headline, width),
        [], "wide")),
      curves("Training", "Thin: as logged. Thick: a mean of neighbours. A line for each run that counts." + note, scored, width,
        { of: "curves", label: "contrastive loss in training", smooth: true }),
      curves("Held-out pairs during the training", "A line for each run that counts; lower is better." + note, scored, width,
        { of: "heldOut", label: "log rank of the right answer", smooth: false }),
      ...board.headlines.map((headline) => heat(headline, scored, note, width)),
    ].filter(Boolean) : [element("p", {}, "No row with a score is shown, so there is no chart.")]));
  }

  function curves(title, caption, scored, room, kind) {
    const chart = curveChart(scored, shared, room, kind);
    const named = scored.map((row, at) => [row, at]).filter(([row, at]) => row[kind.of].length && at < SERIES);
    const key = named.map(([row, at]) => [`var(--series-${at + 1})`, shortened(row.name, 40)]);
    if (scored.some((row, at) => row[kind.of].length && at >= SERIES)) key.push(["var(--neutral)", "the others"]);
    return figure(where, title, caption, chart, key, "wide");
  }

  function heat(headline, scored, note, room) {
    if (!board.reference) return null;
    const found = heatMap(scored.filter((row) => row.differences[headline.name]), headline, room);
    if (!found) return null;
    const [half, eighth, least] = found.thresholds.slice(3).reverse().map((each) => shown(Number(each.toPrecision(2))));
    const key = [[1, `worse by more than ${half}`], [2, `by ${eighth} to ${half}`], [3, `by ${least} to ${eighth}`],
      [4, "less than that"], [5, `better by ${least} to ${eighth}`], [6, `by ${eighth} to ${half}`],
      [7, `by more than ${half}`]].map(([step, text]) => [`var(--heat-${step})`, text]);
    return figure(where, `${headline.name} by dataset, minus ${board.reference}`,
      "Colours show means and not whether a difference is outside the noise: the table says that." + note,
      found.chart, key, "wide");
  }

  const later = delayed(render);
  new ResizeObserver(() => { if (place.clientWidth !== width) later(); }).observe(place);
  return (places) => {
    rows = places.map((each) => board.rows[each]);
    if (width) later(); else render();
  };
}

/** A chart with its title, what it shows, and the key of its colours; null without a chart. `where`: its board. */
function figure(where, title, caption, chart, key = [], kind = "half") {
  if (!chart) return null;
  return element("figure", { class: kind },
    element("figcaption", {}, element("h3", {}, title), element("p", {}, caption)),
    key.length ? element("ul", { class: "key" }, key.map(([value, text]) => {
      const swatch = element("span", { class: "swatch" });
      swatch.style.background = value;
      return element("li", {}, swatch, text);
    })) : null,
    element("div", { class: "scroll", role: "region", "aria-label": `${title}: ${where}`, tabindex: "0" }, chart));
}

/** The same function, once calls have paused. */
function delayed(call) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(call, 120); };
}
