// What a model of the page is: which image it opens with, what its images are, which experts it has.

/** @import { BootModel } from "./types.js" */

/** The image that a model opens with: one whose answer changes without an expert, else its first. @param {BootModel} model */
export const openingExample = ({ card, examples }) => examples.find(({ id }) => id === card.matters?.picture) ?? examples[0];

/** @param {BootModel} model */
export const isOfEmoji = ({ card }) => Boolean(card.data_kind?.startsWith("emoji"));

/** Layer and number of all experts. @param {BootModel} model @returns {[number, number][]} */
export const allExperts = ({ routers }) => routers.flatMap(({ layer, num_experts: experts }) => [...Array(experts).keys()].map((expert) => /** @type {[number, number]} */ ([layer, expert])));
