/**
 * Which process an actor lives in, by what is known of the runners. What it answers may be out of date for a moment, as all
 * that is known of others: who acts on it goes on by message where it was.
 */
import { Context, Effect, Layer } from "effect"
import type * as EntityId from "effect/cluster/EntityId"
import type * as Runner from "effect/cluster/Runner"
import type * as RunnerAddress from "effect/cluster/RunnerAddress"
import * as Sharding from "effect/cluster/Sharding"
import { Membership } from "./Membership.ts"

export class Placement extends Context.Service<
  Placement,
  {
    /** Whether this process is a runner of a cluster. */
    readonly hosts: boolean
    /** Of its group's shards the one that the actor is in, counted from 0. */
    readonly shardOf: (group: string, entityId: string) => number
    /** Whether this process holds the shard of the actor. */
    readonly isHere: (group: string, entityId: string) => boolean
    /** The runner that owns it; `undefined` where there is none, or no cluster. */
    readonly ownerOf: (group: string, entityId: string) => RunnerAddress.RunnerAddress | undefined
    /** The runner that will own it when this one is gone. */
    readonly successorOf: (group: string, entityId: string) => RunnerAddress.RunnerAddress | undefined
    /**
     * Of candidates the one whose actors are spread over the runners as evenly as their weights allow, and would be without any
     * one of them. `actorsOf`: the ids of the actors that a candidate makes.
     */
    readonly mostEven: <A>(
      group: string,
      candidates: Iterable<A>,
      actorsOf: (candidate: A) => ReadonlyArray<string>
    ) => A
  }
>()("ruvector/shards/Placement") {
  static readonly layer = Layer.effect(
    Placement,
    Effect.gen(function* () {
      const sharding = yield* Sharding.Sharding
      const membership = yield* Membership
      const shardOf = (group: string, entityId: string) => sharding.getShardId(entityId as EntityId.EntityId, group)
      return Placement.of({
        hosts: membership.own !== undefined,
        shardOf: (group, entityId) => shardOf(group, entityId).id - 1,
        isHere: (group, entityId) => sharding.hasShardId(shardOf(group, entityId)),
        ownerOf: (group, entityId) => membership.owners(group)[shardOf(group, entityId).id - 1],
        successorOf: (group, entityId) =>
          membership.own === undefined
            ? undefined
            : membership.ownersWith({ without: membership.own }, group)[shardOf(group, entityId).id - 1],
        mostEven: (group, candidates, actorsOf) => {
          const runners = membership.runners()
          const deals = [
            dealOf(membership.owners(group), runners),
            ...runners.slice(0, lossesLookedAt).map(({ address: without }) =>
              dealOf(
                membership.ownersWith({ without }, group),
                runners.filter(({ address }) => address !== without)
              )
            )
          ]
          let best: { readonly candidate: unknown; readonly excess: number } | undefined
          for (const candidate of candidates) {
            const shards = actorsOf(candidate).map((actor) => shardOf(group, actor).id - 1)
            // As it is counts for more than all that may come.
            const excess = deals.reduce(
              (sum, deal, i) => sum + excessOf(deal, shards) * (i === 0 ? deals.length : 1),
              0
            )
            if (best === undefined || excess < best.excess) best = { candidate, excess }
            if (excess === 0) break
          }
          if (best === undefined) throw new RangeError("there has to be a candidate")
          return best.candidate as never
        }
      })
    })
  )
}

/** Runners whose loss is looked at, one at a time. */
const lossesLookedAt = 8

/** Shards' owners, by index, and what each of those weighs. */
interface Deal {
  readonly owners: ReadonlyArray<number>
  readonly weights: ReadonlyArray<number>
}

const dealOf = (owners: ReadonlyArray<RunnerAddress.RunnerAddress>, runners: ReadonlyArray<Runner.Runner>): Deal => {
  const indexes = new Map(runners.map(({ address }, i) => [`${address.host}:${address.port}`, i]))
  return {
    owners: owners.map(({ host, port }) => indexes.get(`${host}:${port}`) ?? 0),
    weights: runners.map(({ weight }) => weight)
  }
}

/** How much more the runner with most of the actors has, for its weight, than it had if they were dealt out evenly. */
const excessOf = ({ owners, weights }: Deal, shards: ReadonlyArray<number>): number => {
  if (owners.length === 0) return 0
  const loads = weights.map(() => 0)
  for (const shard of shards) {
    const owner = owners[shard] as number
    loads[owner] = (loads[owner] as number) + 1 / (weights[owner] as number)
  }
  return Math.max(...loads) - leastLoad(shards.length, weights)
}

/** The heaviest share that a runner has at best, when `count` actors are dealt out to runners of such weights. */
const leastLoad = (count: number, weights: ReadonlyArray<number>): number => {
  if (weights.length === 0) return 0
  const given = weights.map(() => 0)
  let heaviest = 0
  for (let n = 0; n < count; n++) {
    let next = 0
    for (let i = 1; i < weights.length; i++) {
      if (
        ((given[i] as number) + 1) / (weights[i] as number) <
        ((given[next] as number) + 1) / (weights[next] as number)
      ) {
        next = i
      }
    }
    given[next] = (given[next] as number) + 1
    heaviest = Math.max(heaviest, (given[next] as number) / (weights[next] as number))
  }
  return heaviest
}
