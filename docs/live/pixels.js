// An image as a model sees it, to the pixel as Pillow makes it: `Image.resize` with its antialiased bicubic filter.

const BITS = 22; // Pillow's Resample.c computes in whole numbers: weights of so many bits, rounded sums
const REACH = 2; // of the filter, in pixels of the result where it shrinks, else of the image

/** Keys's cubic with a = -0.5. @param {number} at */
function cubic(at) {
  const x = Math.abs(at);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/**
 * For each of `count` results, evenly spread over [from, to] of a line of `length` pixels: the first pixel that it
 * reads and the weights from there on.
 * @param {number} length @param {number} from @param {number} to @param {number} count
 */
function taps(length, from, to, count) {
  const scale = (to - from) / count;
  const wide = Math.max(scale, 1);
  return Array.from({ length: count }, (_, place) => {
    const centre = from + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - REACH * wide + 0.5));
    const end = Math.min(length, Math.trunc(centre + REACH * wide + 0.5));
    const weights = Array.from({ length: end - first }, (__, tap) => cubic((tap + first - centre + 0.5) * (1 / wide)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const whole = weights.map((weight) => { const exact = (weight / sum) * 2 ** BITS; return Math.trunc(exact + (exact < 0 ? -0.5 : 0.5)); });
    return { first, whole };
  });
}

/**
 * The central square of an image in side × side pixels.
 * @param {{ data: Uint8ClampedArray | Uint8Array, width: number, height: number }} image RGBA @param {number} side
 * @returns {Uint8ClampedArray} RGB, row by row
 */
export function squarePixels({ data, width, height }, side) {
  const short = Math.min(width, height);
  const [left, top] = [width, height].map((length) => Math.floor((length - short) / 2));
  const across = taps(width, left, left + short, side);
  const down = taps(height, top, top + short, side);
  const rows = new Uint8ClampedArray(height * side * 3); // the first pass, along each row
  for (let y = 0; y < height; y += 1) {
    across.forEach(({ first, whole }, x) => {
      for (let channel = 0; channel < 3; channel += 1) {
        let sum = 2 ** (BITS - 1);
        for (let tap = 0; tap < whole.length; tap += 1) sum += whole[tap] * data[(y * width + first + tap) * 4 + channel];
        rows[(y * side + x) * 3 + channel] = Math.floor(sum / 2 ** BITS);
      }
    });
  }
  const result = new Uint8ClampedArray(side * side * 3);
  down.forEach(({ first, whole }, y) => {
    for (let x = 0; x < side * 3; x += 1) {
      let sum = 2 ** (BITS - 1);
      for (let tap = 0; tap < whole.length; tap += 1) sum += whole[tap] * rows[(first + tap) * side * 3 + x];
      result[y * side * 3 + x] = Math.floor(sum / 2 ** BITS);
    }
  });
  return result;
}

/**
 * What a network takes, [3, side, side]: divided by 255, minus the mean, over the standard deviation of each channel.
 * @param {Uint8ClampedArray} pixels RGB, row by row @param {number[]} mean @param {number[]} std
 */
export function normalized(pixels, mean, std) {
  const plane = pixels.length / 3;
  return Float32Array.from(pixels, (_, place) => {
    const channel = Math.floor(place / plane);
    return (pixels[(place % plane) * 3 + channel] / 255 - mean[channel]) / std[channel];
  });
}
