"use strict";
const writers = {
  plain: (value) => String(Number(value.toPrecision(4))),
  percent: (value) => (100 * value).toFixed(1) + " %",
  grouped: (value) => Math.round(value).toLocaleString("en"),
  gib: (value) => (value / 2 ** 30).toFixed(2) + " GiB",
};

/* The index of the step that is nearest to one, of steps in order. */
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return Math.abs(steps[high] - step) < Math.abs(steps[low] - step) ? high : low;
}

function line(tip, style, text) {
  const row = tip.appendChild(document.createElement("div"));
  row.className = "line " + style;
  row.textContent = text;
}

for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.querySelector("script").textContent);
  const tip = plot.querySelector(".tip"), cursor = plot.querySelector(".cursor");
  const steps = [...new Set(data.series.flatMap((one) => one.x))].sort((a, b) => a - b);
  let at = -1;
  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at], place = (100 * (step - data.from)) / (data.to - data.from);
    cursor.style.left = place + "%";
    tip.style.left = place < 50 ? place + "%" : "auto";
    tip.style.right = place < 50 ? "auto" : 100 - place + "%";
    tip.replaceChildren();
    line(tip, "step", "step " + step.toLocaleString("en"));
    for (const one of data.series) {
      const found = nearest(one.x, step), other = one.x[found] !== step ? " (step " + one.x[found].toLocaleString("en") + ")" : "";
      line(tip, one.style, one.name + other + ": " + writers[data.unit](one.y[found]));
    }
    tip.hidden = cursor.hidden = false;
  };
  const hide = () => { tip.hidden = cursor.hidden = true; at = -1; };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(nearest(steps, data.from + ((event.clientX - box.left) / box.width) * (data.to - data.from)));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const moved = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (moved === undefined) return;
    event.preventDefault();
    show(moved);
  });
}
