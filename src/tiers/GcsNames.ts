/**
 * How keys are named in a bucket. Google Cloud Storage splits its index by ranges of names, and names that share a
 * beginning share a range until it has split: so the names of a partition begin with a hash of it, and partitions lie in
 * {@link shardCount} places from the start.
 *
 * `<prefix><shard>/<key>`: the shard is two hexadecimal digits, of the CRC-32 of the key's first three segments, where
 * these are a partition's (`collections/<uid>/p000`) and more follows; `-` for all other keys.
 */
import { crc32 } from "node:zlib"

/** Places over which partitions are spread; also how many lists one of everything takes. */
export const shardCount = 64

/** Names below one prefix of a bucket (empty, or with a slash at its end). */
export class GcsNames {
  readonly #prefix: string

  constructor(prefix: string) {
    this.#prefix = prefix
  }

  nameOf(key: string): string {
    return this.nameIn(shardOf(key), key)
  }

  /** A key, or a part of one, in a shard. */
  nameIn(shard: string, key: string): string {
    return `${this.#prefix}${shard}/${key}`
  }

  keyIn(shard: string, name: string): string {
    return name.slice(this.#prefix.length + shard.length + 1)
  }

  /** The shards that keys with this prefix may lie in. One, where the prefix names a whole partition. */
  shardsOf(keyPrefix: string): ReadonlyArray<string> {
    if (partitionPattern.test(keyPrefix)) return [shardOf(keyPrefix)]
    if (root.startsWith(keyPrefix) || keyPrefix.startsWith(root)) return allShards
    return [rest]
  }
}

const root = "collections/"
const rest = "-"
const partitionPattern = /^collections\/[^/]+\/[^/]+\//

const shardOf = (key: string): string => {
  const partition = partitionPattern.exec(key)?.[0]
  return partition === undefined ? rest : shardName(crc32(partition) % shardCount)
}

const shardName = (shard: number): string => shard.toString(16).padStart(2, "0")

const allShards = [rest, ...Array.from({ length: shardCount }, (_, shard) => shardName(shard))]
