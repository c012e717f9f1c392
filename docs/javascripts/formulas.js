// What arithmatex wrapped as \(...\) or \[...\] is drawn.
for (const formula of document.querySelectorAll(".arithmatex")) {
  const tex = formula.textContent.trim();
  katex.render(tex.slice(2, -2), formula, { displayMode: tex.startsWith("\\["), throwOnError: false });
}
