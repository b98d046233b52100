// The experts' colours: those of analysis/plots.py, so that figures and page agree; a test holds them equal.

export const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#BBBBBB"];
export const NEUTRAL = "#C9CDD2";
export const HIGHLIGHT = "#0072B2";
