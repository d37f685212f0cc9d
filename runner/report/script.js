for (const plot of document.querySelectorAll("svg.plot")) {
  const dots = [...plot.querySelectorAll("circle")], told = plot.parentNode.querySelector("output");
  const show = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    const away = (dot) => Math.hypot(dot.cx.baseVal.value - at.x, dot.cy.baseVal.value - at.y);
    const near = dots.reduce((a, b) => (a && away(a) <= away(b) ? a : b), null);
    dots.forEach((dot) => dot.classList.toggle("near", dot === near));
    told.textContent = near ? near.dataset.text : "";
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
}
