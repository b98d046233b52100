// A page of emoji that a visitor types, for a model that has learned such pages: a field, and emoji to pick by group.

import { asAskError } from "./app_server.js";
import { fillBox, html } from "./core_util.js";
/** @import { App } from "./app.js" */

/** @param {App} app */
export const typedField = ({ picture }) =>
  html`<label class="mv-typed"
      ><span class="mv-hidden">Type your own page of emoji</span>
      <input
        type="text" maxlength="400"
        placeholder="Type emoji 🐶🐱…"
        value="${picture.kind === "page" ? picture.text : ""}"
        data-change="typed" data-key="typed"
        autocomplete="off" /></label>
    <details class="mv-menu" data-box="picker">
      <summary class="mv-button" data-key="picker">😀 Pick</summary>
      <div class="mv-menu-list mv-picker" data-part="emoji"></div>
    </details>`;

/** @param {App} app @param {string} text */
const choosePage = (app, text) => app.choosePicture({ kind: "page", text });

/** What the emoji of a text are, as people see them. @param {string} text */
export const emojiOf = (text) =>
  [...new Intl.Segmenter("en", { granularity: "grapheme" }).segment(text)]
    .map(({ segment }) => segment)
    .filter((one) => one.trim());

/** @param {App} app */
export function typedHandlers(app) {
  const field = () => /** @type {HTMLInputElement} */ (app.root.querySelector("[data-change=typed]"));
  return {
    actions: {
      emoji: (button) => {
        const input = field();
        input.value += button.textContent;
        const { fewest, most } = app.typing ?? { fewest: 1, most: 16 };
        const count = emojiOf(input.value).length;
        app.core.announce(`${count} of ${most} emoji`);
        fillBox(app.root.querySelector("[data-part=typed-count]"), `${count} of ${fewest} to ${most}`);
        if (count >= most) choosePage(app, input.value);
      },
      "show-page": () => choosePage(app, field().value),
    },
    changes: {
      typed: (input) => {
        if (input.value.trim()) choosePage(app, input.value);
      },
    },
  };
}

/** Fill the picker when it is opened: emoji of each group. @param {App} app */
export function listenForPicker(app) {
  app.root.addEventListener(
    "toggle",
    async ({ target }) => {
      const menu = /** @type {HTMLDetailsElement} */ (target);
      if (menu.dataset?.box !== "picker" || !menu.open) return;
      const place = menu.querySelector("[data-part=emoji]");
      try {
        const typing = await app.asker.remember("emoji", { model: app.model.id });
        app.typing = typing;
        fillBox(
          place,
          html`${typing.groups.map(
              ({ name, emoji }) =>
                html`<h3>${name}</h3>
                  <p>${emoji.map((one) => html`<button type="button" data-action="emoji">${one}</button>`)}</p>`,
            )}
            <p class="mv-soft">
              <span data-part="typed-count"
                >${emojiOf(app.picture.text ?? "").length} of ${typing.fewest} to ${typing.most}</span
              >
              <button type="button" class="mv-primary" data-action="show-page" data-key="show-page">
                Show this page
              </button>
            </p>`,
        );
      } catch (error) {
        fillBox(place, asAskError(error).message);
      }
    },
    true,
  ); // a details' toggle doesn't bubble
}
