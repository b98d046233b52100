// What is said about an expert: a name that gives its counts, and what taking it away does.

import { percent, signed } from "./core_util.js";
/** @import { ExpertCard } from "./types.js" */

/**
 * "whisker: 45 %, its share of everything: 13 %"; empty where nothing stands out beyond chance.
 * @param {Pick<ExpertCard, "called">} card
 */
export const calledWords = ({ called }) => (called ? `${called.name}: ${percent(called.share)}, its share of everything: ${percent(called.overall)}` : "");

/**
 * What taking it away does over test images; empty where nobody measured it.
 * @param {Pick<ExpertCard, "without">} card
 */
export function withoutWords({ without }) {
  if (!without) return "";
  const { images_per_class: images, delta_logit: delta, control_delta_logit: control, strongest_class: name, strongest_delta_logit: most } = without;
  return `Taken away, over ${images} test images of each class: logit of the true class ${signed(delta)}${control === null ? "" : `, as much at random ${signed(control)}`}; most for ${name}, ${signed(most)}.`;
}
