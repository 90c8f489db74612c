"use strict";
// Connects the controls with the address, follows links without reloading, and keeps figures in the page's colours.
window.dash_clientside = window.dash_clientside || {};
(() => {
  const set = (id, props) => window.dash_clientside.set_props(id, props);
  const looks = document.documentElement;
  const scheme = () => looks.getAttribute("data-mantine-color-scheme") || "light";

  // A value of a control as the address writes it, and back. An empty number is written as OFF.
  const OFF = "off";
  const isEmpty = (value) => value === null || value === undefined || value === "";
  const written = (kind, value) => {
    if (isEmpty(value)) return kind === "number" ? [OFF] : [];
    if (kind === "span") return [`${value[0]}-${value[1]}`];
    return kind === "many" ? value : [String(value)];
  };
  const read = (id, values) => {
    const [first] = values.length ? values : [id.default];
    if (id.kind === "many") return values;
    if (id.kind === "number") return first === OFF ? "" : Number(first);
    if (isEmpty(first)) return null;
    return id.kind === "span" ? first.split("-").map(Number) : first;
  };
  // 0.5 and "0.50" are the same number; no value is the same as an empty list.
  const plain = (kind, value) => {
    if (kind === "number") return isEmpty(value) ? "" : Number(value);
    return value ?? (kind === "many" ? [] : null);
  };
  const same = (kind, a, b) => JSON.stringify(plain(kind, a)) === JSON.stringify(plain(kind, b));
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
        if (same(id.kind, each.value, read(id, params.getAll(id.key)))) continue;
        params.delete(id.key);
        if (same(id.kind, each.value, read(id, []))) continue;
        written(id.kind, each.value).forEach((value) => params.append(id.key, value));
      }
      go(params);
    },
    restored(search, ids, values) {
      const params = new URLSearchParams(search || "");
      ids.forEach((id, i) => {
        const value = read(id, params.getAll(id.key));
        if (!same(id.kind, value, values[i])) set(id, { value });
      });
    },
    // The keys of an address that select a page, and those that select a matrix. The server is asked for either only
    // when its keys change.
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
      // Figures first: a visitor who filters looks at them.
      refilling = setTimeout(() => {
        for (const id of ids) {
          try {
            window.dash_ag_grid.getApi(id).purgeInfiniteCache();
          } catch (error) {
            // A table in a closed tab does not exist yet; it requests its rows when its tab opens.
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
