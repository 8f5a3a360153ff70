"use strict";
// A run's box in the legend shows and hides its lines in every chart.
for (const box of document.querySelectorAll(".legend input")) {
  box.addEventListener("change", () => {
    for (const line of document.querySelectorAll("[data-run]")) {
      if (line.dataset.run === box.value) line.toggleAttribute("hidden", !box.checked);
    }
  });
}

// One slider fades original, masked and reconstruction into one another (0, 1, 2); the
// other picks the frame. Both are range inputs, so that arrow keys move them.
for (const example of document.querySelectorAll(".example")) {
  const version = example.querySelector(".version");
  const frame = example.querySelector(".frame");
  const button = example.querySelector("button");
  const show = () => {
    const place = Number(version.value);
    for (const stack of example.querySelectorAll(".stack")) {
      stack.querySelectorAll("img").forEach((image, i) => {
        // The lower picture stays, the upper one fades in over it.
        image.style.opacity = Math.min(1, Math.max(0, place - i + 1));
      });
    }
    const names = ["original", "masked", "reconstruction"];
    version.setAttribute("aria-valuetext", names[Math.round(place)]);
  };
  const move = () => {
    const at = Number(frame.value);
    for (const image of example.querySelectorAll(".stack.frames img")) {
      image.style.left = `${-100 * at}%`;
    }
    frame.setAttribute("aria-valuetext", `frame ${at + 1} of ${Number(frame.max) + 1}`);
  };
  version.addEventListener("input", show);
  show();
  if (!frame) continue;
  frame.addEventListener("input", move);
  move();
  let timer = 0;
  button.addEventListener("click", () => {
    const playing = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!playing));
    clearInterval(timer);
    if (playing) return;
    timer = setInterval(() => {
      frame.value = (Number(frame.value) + 1) % (Number(frame.max) + 1);
      move();
    }, 1000 / Number(example.dataset.fps));
  });
}
