const plots = [...document.querySelectorAll("[data-plot]")];
const variable = /^var\((--[\w-]+)\)$/;

function themed(value, style) {
  if (typeof value === "string") {
    const name = value.match(variable);
    return name ? style.getPropertyValue(name[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map((part) => themed(part, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, themed(part, style)]));
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const plot of plots) {
    const figure = JSON.parse(document.getElementById(plot.dataset.plot).textContent);
    const { data, layout } = themed(figure, style);
    Plotly.react(plot, data, layout, { displayModeBar: false, responsive: true });
  }
}

draw();
for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", draw);
}
