/**
 * Tags of answers that caches may keep (`Cache-Tag`), by which a CDN purges them. Cloud CDN takes visible ASCII without
 * commas, and at most ten tags in one invalidation.
 */
import { hash } from "node:crypto"
import { type Collection, cacheStateAt } from "../protocol/Collection.ts"

/** Of everything of a collection. */
export const collectionTag = (of: Collection): string => `c-${of.uid}`

/** Of everything of a collection that was given in one of its cache generations. */
export const generationTag = (of: Collection, generation: number): string => `g-${of.uid}-${generation}`

/** Of one vector. */
export const vectorTag = (of: Collection, id: string): string => `v-${digest(`${of.uid}/${id}`)}`

/** Of all searches of a collection. */
export const searchTag = (of: Collection): string => `s-${of.uid}`

/** The tags of an answer about a collection, as the header has them. */
export const cacheTags = (of: Collection, own: string, nowMillis: number): string =>
  `${collectionTag(of)},${generationTag(of, cacheStateAt(of, nowMillis).generation)},${own}`

/** 128 bits of a text's SHA-256, in hex. */
const digest = (text: string): string => hash("sha256", text, "hex").slice(0, 32)
