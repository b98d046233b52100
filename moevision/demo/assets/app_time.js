// Which images have recorded moments of the training, and where they come from.

import { trainedView } from "./core_time.js";
/** @import { App } from "./app.js" */
/** @import { TimeSource, View } from "./types.js" */

/** @param {View} given */
const asTrained = ({ settings }) => !settings.off_distribution && settings.capacity === null && typeof settings.noise !== "number" && !settings.away?.length;

/** @param {App} app @returns {TimeSource} */
export const timeSource = (app) => ({
  about: (views) => {
    const { id: shown, variant } = views[0].model; // another model may be chosen, and on its way
    const history = app.boot.models.find(({ id }) => id === shown)?.history;
    if (!history?.tracks[variant]) return null;
    if (!views.every(asTrained)) return "The training was recorded without changes of the routing.";
    if (!views.every(({ picture: { id } }) => id !== null && history.images.includes(id))) return `The training was recorded for the first ${history.images.length} examples only.`;
    return history;
  },
  get: ({ model: { id, variant }, picture }) => app.asker.remember("history", { model: id, variant, picture: picture.id }),
});

/**
 * The moment to show next: that of a link, or the one that was on the stage when another example was chosen.
 * @param {App} app @param {string | null} kind @param {string | undefined} step of a link
 */
export function nextStep(app, kind, step) {
  if (step !== undefined) return Number(step);
  return kind === "picture" ? app.state?.view.moment?.step : undefined;
}

/** @param {View[]} views */
export const trainedViews = (views) => views.map(trainedView);
