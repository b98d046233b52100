// The same for a network of the opening: its answer is a sentence that begins with how many are away.
async ([selector, wanted]) => {
  const said = () => document.querySelector(".mv-flow-say").textContent.trimStart().match(/^\d/) !== null;
  const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  await painted();
  const start = performance.now();
  document.querySelector(selector).click();
  do { await painted(); } while (said() !== wanted && performance.now() - start < 20000);
  return performance.now() - start;
}
