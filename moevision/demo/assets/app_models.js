// What is known of a model: what its images are, which experts it has, and without which of them an answer falls.

/** @import { BootModel } from "./types.js" */

/**
 * By how few experts the answer for an example falls, where that was searched: { away, ... }; away is null where few don't do it.
 * @param {BootModel} model @param {string | null | undefined} id of the example
 */
export function fallOf({ card }, id) {
  if (!id) return undefined;
  const chosen = card.matters?.picture === id ? card.matters : undefined;
  return card.falls?.[id] ?? chosen;
}

/** @param {BootModel} model */
export const isOfEmoji = ({ card }) => Boolean(card.data_kind?.startsWith("emoji"));

/** Layer and number of all experts. @param {BootModel} model @returns {[number, number][]} */
export const allExperts = ({ routers }) =>
  routers.flatMap(({ layer, num_experts: experts }) =>
    [...Array(experts).keys()].map((expert) => /** @type {[number, number]} */ ([layer, expert])),
  );

/** "cat, chelsea.jpg" of cat/chelsea.jpg. @param {string | null} label @param {string} name */
export const exampleName = (label, name) => (label ? `${label}, ${name.split("/").at(-1)}` : name);
