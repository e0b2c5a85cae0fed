/**
 * What a partition's owner owes the caches and the ahead log: it fences them when it comes, invalidates before a write is
 * acknowledged, and says when it goes whether they may go on being used.
 */
import { Effect, type Scope } from "effect"
import { AheadLog } from "../tiers/AheadLog.ts"
import type { PartitionLogHandle } from "../tiers/PartitionLog.ts"
import { RecordCache } from "../tiers/RecordCache.ts"
import { WarmStore } from "../tiers/WarmStore.ts"
import type * as PartitionWriter from "./PartitionWriter.ts"

/** To be called once the log is claimed and before the partition is served; the answer is given to its writer. */
export const open: (
  entityId: string,
  log: PartitionLogHandle
) => Effect.Effect<PartitionWriter.WriterCaches, never, AheadLog | RecordCache | WarmStore | Scope.Scope> =
  Effect.fnUntraced(function* (entityId: string, log: PartitionLogHandle) {
    const cache = yield* RecordCache
    const warm = yield* WarmStore
    const ahead = yield* (yield* AheadLog).open(entityId, log.epoch)
    cache.dropPartition(entityId)
    yield* warm.fence(entityId, { epoch: log.epoch, seq: log.lastSeq() })
    return {
      ahead,
      onChanged: (ids) => {
        cache.invalidate(entityId, ids)
        return warm.invalidate(entityId, ids)
      },
      onClosed: (clean) => {
        if (clean) return warm.release(entityId, { epoch: log.epoch, seq: log.lastSeq() })
        cache.dropPartition(entityId)
        return warm.distrust(entityId)
      }
    }
  })
