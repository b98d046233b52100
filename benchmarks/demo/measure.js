// Clicks in the page, or chooses a `value` of a list, so that no time of the remote control is measured, and waits until
// `changed` is another and painted.
async ([selector, changed, value]) => {
  const watch = () => document.querySelector(changed).outerHTML;
  const before = watch();
  const painted = () => new Promise((resolve) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  }));
  await painted();
  const start = performance.now();
  const control = document.querySelector(selector);
  if (value === undefined) control.click();
  else {
    control.value = value;
    control.dispatchEvent(new Event("change", { bubbles: true }));
  }
  do { await painted(); } while (watch() === before && performance.now() - start < 20000);
  return performance.now() - start;
}
