// A page of emoji that a visitor types, drawn as moevision.data.emoji draws it: each emoji's picture of the sheet in its cell.

import { emojiOf } from "../../moevision/demo/assets/app_typed.js";

const CELLS = 4; // in a row and in a column
const EMPTY = 128; // grey of a cell without an emoji
const STYLE = /\ufe0f/g; // asks for a coloured picture; people's keyboards send it or don't

/** @typedef {{ src: string, cell: number, columns: number, emoji: [string, string][], fewest: number, most: number }} Sheet emoji and group */

/**
 * Which pictures of the sheet a text asks for, and the group of most of them; a sentence if it can't be drawn.
 * @param {string} text @param {Sheet} sheet @returns {{ numbers: number[], name: string, label: string | null } | { error: string }}
 */
export function readPage(text, { emoji, fewest, most }) {
  const typed = emojiOf(text);
  if (typed.length < fewest || typed.length > most) {
    return {
      error: `A page needs ${fewest} to ${most} emoji, not ${typed.length}: the model learned from full ones, and of emptier ones it knows little.`,
    };
  }
  const places = new Map(emoji.map(([character], number) => [character.replace(STYLE, ""), number]));
  const numbers = typed.map((one) => places.get(one.replace(STYLE, "")) ?? -1);
  const unknown = typed[numbers.indexOf(-1)];
  if (unknown !== undefined)
    return { error: `There is no emoji '${unknown}' on the sheet: choose another one, without skin tone.` };
  const groups = numbers.map((number) => emoji[number][1]);
  const count = (group) => groups.filter((one) => one === group).length;
  const [first, second] = [...new Set(groups)].sort((one, other) => count(other) - count(one));
  return {
    numbers,
    name: typed.join(""),
    label: second !== undefined && count(first) === count(second) ? null : first,
  };
}

/** The page in the sheet's own pixels. @param {number[]} numbers @param {Sheet} sheet @param {ImageData} pixels of the sheet */
export function drawPage(numbers, { cell, columns }, pixels) {
  const side = CELLS * cell;
  const page = new ImageData(side, side);
  page.data.forEach((_, place) => {
    page.data[place] = place % 4 === 3 ? 255 : EMPTY;
  });
  numbers.forEach((number, place) => {
    const [fromX, fromY] = [(number % columns) * cell, Math.floor(number / columns) * cell];
    const [toX, toY] = [(place % CELLS) * cell, Math.floor(place / CELLS) * cell];
    for (let row = 0; row < cell; row += 1) {
      const start = 4 * ((fromY + row) * pixels.width + fromX);
      page.data.set(pixels.data.subarray(start, start + 4 * cell), 4 * ((toY + row) * side + toX));
    }
  });
  return page;
}
