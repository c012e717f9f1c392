// What arithmatex wrapped as \(...\) or \[...\] is drawn; also on pages that instant navigation loads.
document$.subscribe(() => {
  for (const formula of document.querySelectorAll(".arithmatex")) {
    const tex = formula.textContent.trim();
    if (!tex.startsWith("\\")) continue; // drawn already
    katex.render(tex.slice(2, -2), formula, { displayMode: tex.startsWith("\\["), throwOnError: false });
  }
});
