/**
 * Which partition of a collection holds an id. The number of partitions is stored with the collection; the hash is part
 * of the on-disk format (`docs/format.md`) and cannot change for a collection that exists.
 */

/** FNV-1a over the id's UTF-8 bytes, finished with MurmurHash3's mixer, modulo `partitions`. In [0, partitions). */
export const partitionOf = (id: string, partitions: number): number => {
  if (partitions === 1) return 0
  let hash = 0x811c9dc5
  for (const byte of encoder.encode(id)) hash = Math.imul(hash ^ byte, 0x01000193)
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return ((hash ^ (hash >>> 16)) >>> 0) % partitions
}

const encoder = new TextEncoder()

/** Items by the partition that holds each, in the order given. */
export const groupByPartition = <A>(
  items: ReadonlyArray<A>,
  idOf: (item: A) => string,
  partitions: number
): ReadonlyMap<number, ReadonlyArray<A>> => {
  const groups = new Map<number, Array<A>>()
  if (partitions === 1) return items.length === 0 ? groups : groups.set(0, [...items])
  for (const item of items) {
    const partition = partitionOf(idOf(item), partitions)
    const group = groups.get(partition)
    if (group === undefined) groups.set(partition, [item])
    else group.push(item)
  }
  return groups
}
