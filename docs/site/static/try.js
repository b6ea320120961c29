"use strict";
// The page "Try it": the weights of ten losses, drawn, with sliders for the settings of a weighting.

(() => {
  const WIDTH = 640, HEIGHT = 320, LEFT = 60, BOTTOM = 42, TOP = 14, RIGHT = 14, MOST = 6;
  const losses = [0.05, 0.1, 0.2, 0.35, 0.6, 0.9, 1.4, 2.1, 3.2, 5.0];
  const place = document.getElementById("try");
  let member = members[0];
  let settings = {};

  const make = (tag, attributes = {}, ...children) => {
    const drawn = ["svg", "line", "circle", "text", "path", "g"].includes(tag);
    const element = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  const chooser = make("select", { id: "try-weighting" }, ...members.map(({ name }, i) => make("option", { value: i }, name)));
  const sliders = make("div", { class: "try-sliders" });
  const code = make("code", { id: "try-code" });
  const copy = make("button", { type: "button", class: "try-copy" }, "Copy");
  const told = make("p", { id: "try-told", "aria-live": "polite" });
  const chart = make("svg", { id: "try-chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  place.append(
    make("div", { class: "try-settings" }, make("label", { for: "try-weighting" }, "Weighting"), chooser),
    sliders, make("div", { class: "try-code" }, code, copy), chart, told,
  );

  const x = (loss) => LEFT + (loss / MOST) * (WIDTH - LEFT - RIGHT);
  const lossAt = (position) => Math.round(Math.min(MOST, Math.max(0, ((position - LEFT) / (WIDTH - LEFT - RIGHT)) * MOST)) * 100) / 100;
  const rounded = (value) => (value >= 99.5 ? value.toFixed(0) : value >= 9.95 ? value.toFixed(1) : value.toFixed(2));

  // A step of 1, 2 or 5 times a power of ten, for about five marks.
  const stepOf = (top) => {
    const power = 10 ** Math.floor(Math.log10(top / 5));
    return [1, 2, 5, 10].map((factor) => factor * power).find((step) => top / step <= 5);
  };

  const draw = () => {
    const weights = member.weights(losses, settings);
    const curve = member.pointwise ? Array.from({ length: 241 }, (_, i) => (i / 240) * MOST) : [];
    const onCurve = curve.map((loss) => member.weights([loss], settings)[0]);
    const top = 1.08 * Math.max(1.05, ...weights, ...onCurve);
    const y = (weight) => HEIGHT - BOTTOM - (weight / top) * (HEIGHT - BOTTOM - TOP);
    const parts = [];
    const step = stepOf(top);
    for (let mark = 0; mark <= top; mark += step) {
      parts.push(make("line", { class: "try-grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark) }));
      parts.push(make("text", { class: "try-mark", x: LEFT - 7, y: y(mark) + 4, "text-anchor": "end" }, String(Number(mark.toPrecision(6)))));
    }
    for (let mark = 0; mark <= MOST; mark += 1)
      parts.push(make("text", { class: "try-mark", x: x(mark), y: HEIGHT - BOTTOM + 17, "text-anchor": "middle" }, String(mark)));
    parts.push(make("text", { class: "try-title", x: (WIDTH + LEFT - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, "loss"));
    parts.push(make("text", { class: "try-title", x: 15, y: HEIGHT / 2, "text-anchor": "middle", transform: `rotate(-90 15 ${HEIGHT / 2})` }, "weight"));
    parts.push(make("line", { class: "try-one", x1: LEFT, x2: WIDTH - RIGHT, y1: y(1), y2: y(1) }));
    if (curve.length)
      parts.push(make("path", { class: "try-curve", d: curve.map((loss, i) => `${i ? "L" : "M"}${x(loss)},${y(onCurve[i])}`).join("") }));
    losses.forEach((loss, i) => {
      parts.push(make("line", { class: "try-stem", x1: x(loss), x2: x(loss), y1: y(0), y2: y(weights[i]) }));
      parts.push(make("circle", { class: "try-sample", cx: x(loss), cy: y(weights[i]), r: 7, "data-sample": i }));
    });
    chart.replaceChildren(...parts);
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const effective = total ** 2 / weights.reduce((sum, weight) => sum + weight ** 2, 0) || 0;
    chart.setAttribute("aria-label", `The weights of ${losses.length} losses: ${weights.map(rounded).join(", ")}`);
    code.textContent = member.code(settings);
    told.textContent =
      `Mean weight ${rounded(total / losses.length)}, largest ${rounded(Math.max(...weights))}. The weighted mean is as ` +
      `noisy as a plain mean of ${rounded(effective)} of the ${losses.length} samples. The dashed line is plain training.`;
  };

  const choose = () => {
    member = members[chooser.value];
    settings = Object.fromEntries(member.settings.map(({ name, value }) => [name, value]));
    sliders.replaceChildren(
      ...member.settings.map(({ name, from, to, value, step }) => {
        const input = make("input", { type: "range", id: `try-${name}`, min: from, max: to, step, value });
        const shown = make("output", { for: `try-${name}` }, String(value));
        input.addEventListener("input", () => {
          settings[name] = Number(input.value);
          shown.textContent = input.value;
          draw();
        });
        return make("div", { class: "try-settings" }, make("label", { for: `try-${name}` }, name), input, shown);
      }),
    );
    draw();
  };

  let held = null;
  chart.addEventListener("pointerdown", (event) => {
    if (!event.target.dataset.sample) return;
    held = Number(event.target.dataset.sample);
    chart.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  chart.addEventListener("pointermove", (event) => {
    if (held === null) return;
    const box = chart.getBoundingClientRect();
    losses[held] = lossAt(((event.clientX - box.left) / box.width) * WIDTH);
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) chart.addEventListener(end, () => (held = null));
  copy.addEventListener("click", () => navigator.clipboard.writeText(code.textContent));
  chooser.addEventListener("change", choose);
  choose();
})();
