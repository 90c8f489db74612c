"use strict";
// Draws the figures, follows the page's light or dark, sorts and unfolds tables. Without it the page still reads.
(() => {
  const looks = JSON.parse(document.getElementById("looks").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];
  const look = () => looks[dark.matches ? "dark" : "light"];
  const PRINTED = 680; // pixels: the text width of A4 and Letter pages

  function draw(plot) {
    const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
    layout.template = look();
    layout.margin = { t: 36, ...layout.margin };
    const config = {
      responsive: true,
      displaylogo: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d"],
      toImageButtonOptions: { filename: plot.dataset.name, format: "svg" },
    };
    return Plotly.newPlot(plot, data, layout, config).catch((error) => {
      plot.textContent = `This figure could not be drawn here: ${error.message}`;
    });
  }

  // One after the other, so that the page answers in between.
  const drawn = plots.reduce(
    (before, plot) => before.then(() => new Promise((go) => setTimeout(go))).then(() => draw(plot)),
    Promise.resolve(),
  );
  drawn.then(() => document.documentElement.classList.add("drawn"));

  const ready = () => plots.filter((plot) => plot.classList.contains("js-plotly-plot"));
  dark.addEventListener("change", () => ready().forEach((plot) => Plotly.relayout(plot, { template: look() })));
  addEventListener("beforeprint", () =>
    ready().forEach((plot) => Plotly.relayout(plot, { template: looks.light, width: PRINTED })));
  addEventListener("afterprint", () =>
    ready().forEach((plot) => Plotly.relayout(plot, { template: look(), width: null, autosize: true })));

  function sortable(table) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.ariaSort = "none";
      button.addEventListener("click", () => {
        const numeric = head.classList.contains("n");
        const down = head.ariaSort === "none" ? numeric : head.ariaSort === "ascending";
        const key = (row) => {
          const cell = row.cells[column];
          return numeric ? parseFloat(cell.dataset.v ?? "NaN") : cell.textContent;
        };
        const compare = (a, b) => {
          if (!numeric) return a.localeCompare(b, undefined, { numeric: true }) * (down ? -1 : 1);
          // What was not measured comes last either way.
          return Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : (a - b) * (down ? -1 : 1);
        };
        const rows = [...body.rows].map((row) => [key(row), row]);
        body.append(...rows.sort((a, b) => compare(a[0], b[0])).map(([, row]) => row));
        for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
        head.ariaSort = down ? "descending" : "ascending";
      });
    });
  }

  function unfolding(table) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "more";
    const fold = (folded) => {
      table.classList.toggle("folded", folded);
      button.textContent = folded ? `Show all ${table.tBodies[0].rows.length} rows` : "Show fewer rows";
      button.ariaExpanded = String(!folded);
    };
    button.addEventListener("click", () => fold(!table.classList.contains("folded")));
    table.closest(".scroll").after(button);
    fold(true);
  }

  document.querySelectorAll("table.data").forEach(sortable);
  document.querySelectorAll("table.long").forEach(unfolding);
})();
