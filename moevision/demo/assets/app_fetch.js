// Who answers the page: the server that sent it. A page without one has another file in the place of this (docs/live).

/** @import { Server } from "./types.js" */

/**
 * What the server answers: `server.route(question)`.
 * @type {Server}
 */
export const server = new Proxy({}, {
  get: (_, name) => async (question = {}) => {
    const home = location.pathname.replace(/\/?$/, "/"); // below a proxy's path, too
    const headers = { "content-type": "application/json" };
    const answer = await fetch(`${home}api/${String(name)}`, { method: "POST", headers, body: JSON.stringify(question) });
    return answer.json();
  },
});
