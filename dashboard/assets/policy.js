"use strict";
// Ties thresholds to the address: an empty field means that there is none, which the address writes as "off".
(() => {
  const OFF = "off";
  const read = (text) => (text === OFF ? "" : Number(text));
  const same = (a, b) => (a === "" || b === "" ? a === b : Number(a) === Number(b));

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.tunescopePolicy = {
    tried() {
      const params = new URLSearchParams(location.search);
      for (const each of window.dash_clientside.callback_context.triggered) {
        const at = each.prop_id.lastIndexOf(".");
        if (at < 1) continue;
        const id = JSON.parse(each.prop_id.slice(0, at));
        const value = each.value ?? "";
        if (same(value, read(params.get(id.key) ?? id.default))) continue;
        if (same(value, read(id.default))) params.delete(id.key);
        else params.set(id.key, value === "" ? OFF : String(value));
      }
      const search = `?${params}`;
      if (search !== location.search) window.dash_clientside.set_props("url", { search });
    },
    restored(search, ids, values) {
      const params = new URLSearchParams(search || "");
      ids.forEach((id, i) => {
        const value = read(params.get(id.key) ?? id.default);
        if (!same(value, values[i] ?? "")) window.dash_clientside.set_props(id, { value });
      });
    },
  };
})();
