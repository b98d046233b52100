// Replays the flight, and returns the milliseconds between its frames.
async () => {
  const times = [];
  document.querySelector("[data-action=fly]").click();
  await new Promise((done) => {
    const tick = (now) => {
      times.push(now);
      (times.at(-1) - times[0] < 1900) ? requestAnimationFrame(tick) : done();
    };
    requestAnimationFrame(tick);
  });
  return times.slice(1).map((time, place) => time - times[place]);
}
