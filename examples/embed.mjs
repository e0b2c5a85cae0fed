/**
 * Text as a vector, so that examples need no model and no key: words and their parts, hashed to 256 numbers with a sign
 * each. Texts with words in common are near each other; put a real embedding model in its place.
 *
 * @param {string} text
 * @returns {Float32Array}
 */
export const embed = (text) => {
  const vector = new Float32Array(256)
  /**
   * @param {string} part
   * @param {number} weight
   */
  const add = (part, weight) => {
    let hash = 2_166_136_261
    for (let i = 0; i < part.length; i++) hash = Math.imul(hash ^ part.charCodeAt(i), 16_777_619)
    hash ^= hash >>> 15
    const at = hash & 255
    vector[at] = (vector[at] ?? 0) + (hash & 256 ? weight : -weight)
  }
  // Short words say little of what a text is about.
  for (const word of text.toLowerCase().match(/\p{L}{4,}/gu) ?? []) {
    add(word, 2)
    for (let i = 0; i + 4 <= word.length; i++) add(word.slice(i, i + 4), 1)
  }
  return vector
}
