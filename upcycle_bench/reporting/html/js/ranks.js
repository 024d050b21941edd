/* The critical-difference diagram: mean ranks over seeds; bars above join strategies that cannot be told apart. */

/** The ranking of the rows that are shown; null without any of them. */
function rankChart(rows, headline, width) {
  const { strategies, bars, distance, ranked } = headline.ranking;
  const found = strategies.map((each) => ({ ...each, row: rows.find(({ title }) => title === each.title) }))
    .filter(({ row }) => row).map((each, place) => ({ ...each, place }));
  if (!found.length) return null;
  const top = -bars.length - 1; // lines above the names: one for each bar, and one for the critical difference
  const axis = nameAxis(found, width);
  return draw(`${headline.name}: mean ranks over training seeds, with bars`, {
    width, height: 90 + 22 * (found.length + bars.length), ...axis, marginRight: 30, marginTop: 44,
    x: { label: "mean rank, 1 is the best", labelArrow: "none", axis: "top", domain: [1, Math.max(ranked, 1 + distance)],
      ticks: Math.max(2, width / 140) },
    y: { ...axis.y, reverse: true, domain: [top - 1.2, found.length - 0.5], ticks: found.map(({ place }) => place) },
    marks: [
      Plot.ruleX(found, { x: "rank", y1: top + 0.5, y2: "place", stroke: "var(--line)" }),
      Plot.ruleY(bars, { x1: ([low]) => low, x2: ([, high]) => high, y: (_, level) => top + 1 + level,
        stroke: "var(--text)", strokeWidth: 4 }),
      Plot.ruleY([distance], { x1: 1, x2: 1 + distance, y: top, stroke: "var(--accent)", strokeWidth: 2 }),
      Plot.text([distance], { x: 1, y: top, text: (each) => `critical difference ${each.toFixed(2)}`, textAnchor: "start", dy: -8 }),
      Plot.dot(found, { x: "rank", y: "place", r: 4.5, fill: ({ row }) => colour(row.headlines[headline.name]) }),
      Plot.tip(found, Plot.pointer({ x: "rank", y: "place",
        title: ({ title, rank, bars: letters }) => `${title}\nmean rank ${shown(rank)}${letters ? `, bars ${letters}` : ""}` })),
    ],
  });
}
