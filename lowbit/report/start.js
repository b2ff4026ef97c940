"use strict";
// Draws every chart of the page from the JSON beside it. The expression interpreter keeps eval out of the page's
// security policy, and the loader refuses addresses, so a chart can show nothing but the page's own data.
const refuse = { load: (uri) => Promise.reject(new Error("a report loads nothing: " + uri)), sanitize: (uri) => Promise.reject(new Error("a report links nothing: " + uri)) };
for (const spec of document.querySelectorAll('script[type="application/json"][data-chart]')) {
  const place = document.getElementById(spec.dataset.chart);
  window.vegaEmbed(place, JSON.parse(spec.textContent), { mode: "vega-lite", renderer: "svg", actions: false, ast: true, loader: refuse })
    .then(() => { place.dataset.drawn = "yes"; })
    .catch((error) => {
      place.className = "failed";
      place.textContent = "This chart could not be drawn: " + error.message;
      console.error(error);
    });
}
