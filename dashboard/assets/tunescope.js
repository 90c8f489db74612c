"use strict";
// Ties the controls to the address, follows links without loading anew, and keeps figures in the page's colours.
window.dash_clientside = window.dash_clientside || {};
(() => {
  const set = (id, props) => window.dash_clientside.set_props(id, props);
  const looks = document.documentElement;
  const scheme = () => looks.getAttribute("data-mantine-color-scheme") || "light";

  // A value of a control as the address writes it, and back.
  const written = (kind, value) => {
    if (value === null || value === undefined || value === "") return [];
    if (kind === "span") return [`${value[0]}-${value[1]}`];
    return kind === "many" ? value : [String(value)];
  };
  const read = (id, values) => {
    const given = values.length ? values : id.default ? [id.default] : [];
    if (id.kind === "many") return given;
    if (!given.length) return null;
    if (id.kind === "span") return given[0].split("-").map(Number);
    return given[0];
  };
  const same = (a, b) => JSON.stringify(a ?? null) === JSON.stringify(b ?? null);
  const go = (params) => {
    const search = `?${params}`;
    if (search !== location.search) set("url", { search });
  };

  window.dash_clientside.tunescope = {
    chosen() {
      const params = new URLSearchParams(location.search);
      for (const each of window.dash_clientside.callback_context.triggered) {
        const at = each.prop_id.lastIndexOf(".");
        if (at < 1) continue;
        const id = JSON.parse(each.prop_id.slice(0, at));
        const values = written(id.kind, each.value);
        if (same(values, params.getAll(id.key))) continue;
        params.delete(id.key);
        if (!(values.length === 1 && values[0] === id.default)) values.forEach((value) => params.append(id.key, value));
      }
      go(params);
    },
    restored(search, ids, values) {
      const params = new URLSearchParams(search || "");
      ids.forEach((id, i) => {
        const value = read(id, params.getAll(id.key));
        const now = id.kind === "many" ? values[i] || [] : values[i];
        if (!same(value, now)) set(id, { value });
      });
    },
    // Where an address leads, without what only the controls of that place read: the server is asked
    // for a page, or for a matrix, only when it is another one.
    placed(search, inside, page, spot) {
      const params = new URLSearchParams(search || "");
      const now = { page: new URLSearchParams(), spot: new URLSearchParams() };
      for (const [key, value] of params) {
        if (!inside.includes(key)) now.page.append(key, value);
        if (["audit", "analysis", "matrix", "cell"].includes(key)) now.spot.append(key, value);
      }
      if (!(params.has("matrix") || params.has("cell"))) now.spot = "";
      const next = (name, before) => {
        const text = now[name] === "" ? "" : `?${now[name]}`;
        return text === (before || "") ? window.dash_clientside.no_update : text;
      };
      return [next("page", page), next("spot", spot)];
    },
    closed(opened) {
      const params = new URLSearchParams(location.search);
      if (opened || !(params.has("matrix") || params.has("cell"))) return;
      params.delete("matrix");
      params.delete("cell");
      go(params);
    },
    refill(_search, ids) {
      clearTimeout(refilling);
      // Figures first: they are what a person who filters looks at.
      refilling = setTimeout(() => {
        for (const id of ids) {
          try {
            window.dash_ag_grid.getApi(id).purgeInfiniteCache();
          } catch (error) {
            // A table that is not shown has not been drawn; it asks for its rows when it is.
          }
        }
      }, 350);
    },
    turned(title, templates) {
      window.tunescopeLooks = templates;
      if (title) document.title = title;
      set("scheme", { data: scheme() });
      set("trouble", { children: null });
      if (moved) {
        moved = false;
        requestAnimationFrame(() => {
          scrollTo(0, 0);
          document.getElementById("heading")?.focus({ preventScroll: true });
        });
      }
    },
    burger(opened, _shown, navbar) {
      const turned = window.dash_clientside.callback_context.triggered.some((each) => each.prop_id === "shown.data");
      const open = opened && !turned;
      return [{ ...navbar, collapsed: { mobile: !open } }, open, open ? "" : "folded"];
    },
  };

  const fetched = window.fetch;
  window.fetch = (...request) =>
    fetched(...request).then(
      (answer) => {
        looks.classList.remove("is-lost");
        return answer;
      },
      (error) => {
        if (error.name !== "AbortError") looks.classList.add("is-lost");
        throw error;
      },
    );

  let moved = false;
  let refilling = 0;
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="?"]');
    if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    moved = true;
    set("url", { search: link.getAttribute("href") });
  });

  new MutationObserver(() => {
    const look = window.tunescopeLooks?.[scheme()];
    set("scheme", { data: scheme() });
    if (look) document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.relayout(plot, { template: look }));
  }).observe(looks, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });
})();
