/**
 * Partitions change their runner with as little of a pause as can be. A runner that goes takes a snapshot of what is new in each
 * and tells who will own it next to open that, while it still serves; only then it lets go. One that comes has those who own what
 * it will own take such snapshots, and opens them before it says that it is there. Both are bounded by `prepareMillis`: what was
 * not prepared is opened when it is needed.
 */
import { Cause, Effect, Exit, Layer, Option, Result, Schema } from "effect"
import * as Runner from "effect/cluster/Runner"
import type * as RunnerAddress from "effect/cluster/RunnerAddress"
import { Settings } from "../config.ts"
import { type PartitionAddress, partitionAddressOf, partitionId, partitionsGroup } from "../protocol/IndexPartition.ts"
import type { Moving } from "../protocol/Peer.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import { Membership } from "../shards/Membership.ts"
import { Peers } from "../shards/Peers.ts"
import { Placement } from "../shards/Placement.ts"
import { CatalogueText, catalogueKey } from "../tiers/CatalogueObject.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import { PartitionOpener } from "./OpenPartition.ts"

/** Partitions prepared or snapshotted at once. */
const preparedAtOnce = 4

/** Between the end of the actors' layer and that of the partitions: so it has to be above their actors. */
export const layer = Layer.effectDiscard(
  Effect.gen(function* () {
    const settings = yield* Settings
    const membership = yield* Membership
    const { own } = membership
    if (own === undefined) return
    const local = yield* LocalActors
    const peers = yield* Peers
    const placement = yield* Placement
    const opener = yield* PartitionOpener
    const store = yield* ObjectStore

    const addressOf = ({ collection, partition }: Moving): PartitionAddress => ({
      collection: collection.name,
      uid: collection.uid,
      partition
    })
    const prepareAll = (partitions: ReadonlyArray<Moving>) =>
      Effect.forEach(
        partitions.filter((moving) => !local.partitions.has(partitionId(addressOf(moving)))),
        (moving) => opener.prepare(addressOf(moving), moving.collection),
        { concurrency: preparedAtOnce, discard: true }
      )
    peers.prepareWith(prepareAll)

    /** Of all collections, what this runner is going to be given, by who owns it now; nothing where it is the only one. */
    const toCome: Effect.Effect<Iterable<readonly [RunnerAddress.RunnerAddress, ReadonlyArray<Moving>]>> = Effect.gen(
      function* () {
        yield* membership.look
        if (membership.runners().length === 0) return []
        const plus = new Runner.Runner({ address: own, groups: [partitionsGroup], weight: settings.clusterWeight })
        const owners = membership.owners(partitionsGroup)
        const ownersNext = membership.ownersWith({ plus }, partitionsGroup)
        const object = yield* Effect.option(store.get(catalogueKey))
        if (Option.isNone(object)) return []
        const read = Schema.decodeUnknownResult(CatalogueText)(Buffer.from(object.value.body).toString("utf8"))
        if (Result.isFailure(read)) return []
        const coming = new Map<RunnerAddress.RunnerAddress, Array<Moving>>()
        for (const collection of read.success.collections) {
          for (let partition = 0; partition < collection.partitions; partition++) {
            const moving = { collection, partition }
            const shard = placement.shardOf(partitionsGroup, partitionId(addressOf(moving)))
            const owner = owners[shard]
            if (owner === undefined || !sameAddress(ownersNext[shard], own)) continue
            coming.set(owner, [...(coming.get(owner) ?? []), moving])
          }
        }
        return coming
      }
    )
    const takeOver = (owner: RunnerAddress.RunnerAddress, partitions: ReadonlyArray<Moving>) =>
      peers
        .handOver(
          owner,
          partitions.map((moving) => partitionId(addressOf(moving)))
        )
        .pipe(
          Effect.timeoutOption(settings.prepareMillis / 2),
          Effect.catch(() => Effect.logDebug("A runner could not be asked for snapshots of what it is to give")),
          Effect.andThen(prepareAll(partitions))
        )
    yield* toCome.pipe(
      Effect.flatMap((coming) =>
        Effect.forEach(coming, ([owner, partitions]) => takeOver(owner, partitions), {
          concurrency: "unbounded",
          discard: true
        })
      ),
      Effect.timeoutOption(settings.prepareMillis),
      Effect.ensuring(membership.admit),
      Effect.forkScoped
    )

    const handOver = Effect.gen(function* () {
      const count = local.partitions.size
      const next = new Map<RunnerAddress.RunnerAddress, Array<Moving>>()
      yield* Effect.forEach(
        [...local.partitions],
        ([entityId, partition]) =>
          Effect.map(partition.handOver, () => {
            const successor = placement.successorOf(partitionsGroup, entityId)
            if (successor === undefined) return
            const moving = { collection: partition.collection, partition: partitionAddressOf(entityId).partition }
            next.set(successor, [...(next.get(successor) ?? []), moving])
          }),
        { concurrency: preparedAtOnce, discard: true }
      )
      yield* Effect.forEach(
        next,
        ([successor, partitions]) =>
          Effect.catch(peers.prepare(successor, partitions), () =>
            Effect.logDebug("A runner could not be told of partitions that it is to own next")
          ),
        { concurrency: "unbounded", discard: true }
      )
      yield* Effect.logInfo("Partitions are handed over", {
        partitions: count,
        left: local.partitions.size,
        runners: next.size
      })
    })
    const runFork = Effect.runForkWith(yield* Effect.context<never>())
    yield* Effect.addFinalizer(() =>
      // In a fiber of its own: this one may have been interrupted, and cannot be any more.
      Effect.callback<void>((resume) => {
        const fiber = runFork(handOver)
        const timer = setTimeout(() => resume(Effect.void), settings.prepareMillis)
        fiber.addObserver((exit) => {
          clearTimeout(timer)
          resume(
            Exit.isSuccess(exit)
              ? Effect.void
              : Effect.logWarning("Partitions could not be handed over", Cause.squash(exit.cause))
          )
        })
      })
    )
  })
)

const sameAddress = (one: RunnerAddress.RunnerAddress | undefined, other: RunnerAddress.RunnerAddress): boolean =>
  one !== undefined && one.host === other.host && one.port === other.port
