/** The logs of a collection's partitions as they lie in a data directory, read by the object store's own code. */
import { Effect, Result } from "effect"
import { layer as fileStore } from "../../src/tiers/FileObjectStore.ts"
import { decodeSegment } from "../../src/tiers/LogSegment.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { decodeManifest } from "../../src/tiers/PartitionManifest.ts"
import type { PartitionHistory } from "./partitionHistory.ts"

export const readLogs = (objects: string, uid: string, partitions: number): Promise<ReadonlyArray<PartitionHistory>> =>
  Effect.forEach(
    Array.from({ length: partitions }, (_, n) => n),
    (n) => readLog(uid, n)
  ).pipe(Effect.provide(fileStore({ directory: objects })), Effect.runPromise)

const readLog = Effect.fnUntraced(function* (uid: string, partition: number) {
  const store = yield* ObjectStore
  const prefix = `collections/${uid}/p${String(partition).padStart(3, "0")}`
  const manifest = Result.getOrThrow(decodeManifest((yield* store.get(`${prefix}/manifest`)).body))
  const segments: Array<PartitionHistory["segments"][number]> = []
  let startAfter: string | undefined
  for (;;) {
    const page = yield* store.list(`${prefix}/log/`, startAfter === undefined ? {} : { startAfter })
    if (page.length === 0) break
    for (const { key } of page) segments.push(decodeSegment((yield* store.get(key)).body))
    startAfter = page.at(-1)?.key
  }
  const { epoch, prunedSeq } = manifest
  return { partition, epoch, prunedSeq, segments: segments.filter(({ seq }) => seq > prunedSeq) }
})
