/** Where the partitions of new collections come to lie, by the hash ring that Effect Cluster deals shards out with. */
import { assert, describe, it } from "@effect/vitest"
import { Context, Effect, Exit, HashRing, Layer, Option, Scope } from "effect"
import * as MessageStorage from "effect/cluster/MessageStorage"
import * as Runner from "effect/cluster/Runner"
import * as RunnerAddress from "effect/cluster/RunnerAddress"
import * as RunnerHealth from "effect/cluster/RunnerHealth"
import * as RunnerStorage from "effect/cluster/RunnerStorage"
import * as Runners from "effect/cluster/Runners"
import * as Sharding from "effect/cluster/Sharding"
import * as ShardingConfig from "effect/cluster/ShardingConfig"
import { defaultSettings, Settings } from "../../src/config.ts"
import { partitionId, partitionsGroup } from "../../src/protocol/IndexPartition.ts"
import { Membership, shardsPerGroup } from "../../src/shards/Membership.ts"
import { Placement } from "../../src/shards/Placement.ts"
import { random } from "../support/Seeded.ts"

const runnersOf = (weights: ReadonlyArray<number>) =>
  weights.map(
    (weight, n) =>
      new Runner.Runner({ address: RunnerAddress.make("10.0.0.1", 9_000 + n), groups: [partitionsGroup], weight })
  )

const ownersOf = (runners: ReadonlyArray<Runner.Runner>) => {
  const ring = HashRing.make<RunnerAddress.RunnerAddress>()
  for (const { address, weight } of runners) HashRing.add(ring, address, { weight })
  return HashRing.getShards(ring, shardsPerGroup) ?? []
}

/** Says which of a cluster's shards an actor is in. */
const sharding = Sharding.layer.pipe(
  Layer.provide([Runners.layerNoop, RunnerStorage.layerMemory, RunnerHealth.layerNoop]),
  Layer.provide(MessageStorage.layerMemory),
  Layer.provide(ShardingConfig.layer({ shardsPerGroup, runnerAddress: Option.none() }))
)

const placed = async (weights: ReadonlyArray<number>, use: (placement: Placement["Service"]) => void) => {
  const runners = runnersOf(weights)
  const membership = {
    ...Context.get(await Effect.runPromise(Effect.scoped(Layer.build(Membership.layerAlone))), Membership),
    runners: () => runners,
    owners: () => ownersOf(runners),
    ownersWith: ({ without }: { readonly without?: RunnerAddress.RunnerAddress }) =>
      ownersOf(runners.filter(({ address }) => address !== without))
  }
  const scope = await Effect.runPromise(Scope.make())
  const layer = Placement.layer.pipe(
    Layer.provide(sharding),
    Layer.provide([Layer.succeed(Membership, membership), Layer.succeed(Settings, defaultSettings)])
  )
  try {
    use(Context.get(await Effect.runPromise(Layer.buildWithScope(layer, scope)), Placement))
  } finally {
    await Effect.runPromise(Scope.close(scope, Exit.void))
  }
}

const actors = (uid: string, count: number) =>
  Array.from({ length: count }, (_, partition) => partitionId({ collection: "c", uid, partition }))

const loads = (placement: Placement["Service"], uid: string, count: number): ReadonlyArray<number> => {
  const all = new Map<number, number>()
  for (const actor of actors(uid, count)) {
    const port = placement.ownerOf(partitionsGroup, actor)?.port as number
    all.set(port, (all.get(port) ?? 0) + 1)
  }
  return [...all].sort(([a], [b]) => a - b).map(([, load]) => load)
}

describe("partitions of a new collection", () => {
  const seed = Number(process.env["SEED"] ?? Math.floor(Math.random() * 2 ** 31))
  for (const [weights, count, expected] of [
    [[1, 1, 1], 6, [2, 2, 2]],
    [[1, 1, 1], 3, [1, 1, 1]],
    [[1, 2, 1], 8, [2, 4, 2]]
  ] as const) {
    it(`are spread by weight: ${count} over ${weights.join(":")} (seed ${seed})`, async () => {
      const { next } = random(seed)
      const uid = () =>
        Math.floor(next() * 2 ** 48)
          .toString(16)
          .padStart(16, "0")
      await placed(weights, (placement) => {
        for (let collection = 0; collection < 10; collection++) {
          const uids = Array.from({ length: 300 }, uid)
          const chosen = placement.mostEven(partitionsGroup, uids, (one) => actors(one, count))
          assert.deepStrictEqual(loads(placement, chosen, count), expected)
        }
      })
    })
  }
})
