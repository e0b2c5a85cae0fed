/**
 * Direct connections to the runners of the cluster, one to each beside the one that carries messages to actors: a search does not
 * wait behind a large insert, and is a smaller message.
 */
import { Context, Data, Effect, Exit, Fiber, Layer, Scope } from "effect"
import type * as RunnerAddress from "effect/cluster/RunnerAddress"
import * as Runners from "effect/cluster/Runners"
import * as RpcClient from "effect/rpc/RpcClient"
import * as RpcClientError from "effect/rpc/RpcClientError"
import type { PartitionError, PartitionHits, PartitionQuery } from "../protocol/IndexPartition.ts"
import { type Moving, NotHere, PeerRpcs } from "../protocol/Peer.ts"
import { LocalActors } from "./LocalActors.ts"
import { Membership } from "./Membership.ts"

/** There is no connection to the process, or it broke before the answer came. */
export class PeerGone extends Data.TaggedError("PeerGone") {}

/** What a process does when it is told of partitions that it is to own next. */
export type Prepare = (partitions: ReadonlyArray<Moving>) => Effect.Effect<void>

export class Peers extends Context.Service<
  Peers,
  {
    readonly search: (
      address: RunnerAddress.RunnerAddress,
      partition: string,
      query: PartitionQuery
    ) => Effect.Effect<PartitionHits, PartitionError | NotHere | PeerGone>
    /** Has it take snapshots of partitions that another is to own next. */
    readonly handOver: (
      address: RunnerAddress.RunnerAddress,
      partitions: ReadonlyArray<string>
    ) => Effect.Effect<void, PeerGone>
    readonly prepare: (
      address: RunnerAddress.RunnerAddress,
      partitions: ReadonlyArray<Moving>
    ) => Effect.Effect<void, PeerGone>
    /** From now on this process prepares so. */
    readonly prepareWith: (prepare: Prepare) => void
    readonly prepareHere: Prepare
  }
>()("ruvector/shards/Peers") {
  /** A process that is alone. */
  static readonly layerAlone = Layer.succeed(
    Peers,
    Peers.of({
      search: () => Effect.fail(new PeerGone()),
      handOver: () => Effect.fail(new PeerGone()),
      prepare: () => Effect.fail(new PeerGone()),
      prepareWith: () => {},
      prepareHere: () => Effect.void
    })
  )

  static readonly layer = Layer.effect(
    Peers,
    Effect.gen(function* () {
      const protocols = yield* Runners.RpcClientProtocol
      const membership = yield* Membership
      const scope = yield* Effect.scope
      const runFork = Effect.runForkWith(yield* Effect.context<never>())
      const connections = new Map<string, Connection>()

      const connect = (address: RunnerAddress.RunnerAddress): Connection => {
        const name = `${address.host}:${address.port}`
        const found = connections.get(name)
        if (found !== undefined) return found
        const own = Scope.forkUnsafe(scope)
        const made: Connection = {
          client: undefined,
          opened: Effect.fail(new PeerGone()),
          scope: own,
          waiting: new Set()
        }
        const opening = runFork(
          Effect.gen(function* () {
            const protocol = yield* protocols.make(address)
            made.client = yield* RpcClient.make(PeerRpcs, { disableTracing: true }).pipe(
              Effect.provideService(RpcClient.Protocol, protocol)
            )
            return made.client
          }).pipe(Scope.provide(own))
        )
        made.opened = Effect.callback((resume) => {
          opening.addObserver((exit) => resume(exit))
        })
        connections.set(name, made)
        return made
      }

      yield* Scope.addFinalizer(
        scope,
        Effect.sync(
          membership.onChange(() => {
            const there = new Set(membership.runners().map(({ address: { host, port } }) => `${host}:${port}`))
            for (const [name, connection] of connections) {
              if (there.has(name)) continue
              connections.delete(name)
              for (const gone of connection.waiting) gone()
              runFork(Scope.close(connection.scope, Exit.void))
            }
          })
        )
      )

      /** A connection that is given up ends what waits for it at once: it may not be there to be told. */
      const using = <A, E>(
        address: RunnerAddress.RunnerAddress,
        use: (client: PeerClient) => Effect.Effect<A, E>
      ): Effect.Effect<A, Exclude<E, RpcClientError.RpcClientError> | PeerGone> =>
        Effect.withFiber((parent) =>
          Effect.callback<A, Exclude<E, RpcClientError.RpcClientError> | PeerGone>((resume) => {
            const connection = connect(address)
            const { client } = connection
            const call = client === undefined ? Effect.flatMap(connection.opened, use) : use(client)
            const gone = () => resume(Effect.fail(new PeerGone()))
            connection.waiting.add(gone)
            const fiber = Effect.runForkWith(parent.context as Context.Context<never>)(call)
            fiber.addObserver((exit) => {
              connection.waiting.delete(gone)
              if (Exit.isSuccess(exit)) return resume(Effect.succeed(exit.value))
              const error = Exit.findErrorOption(exit)
              // Also an interruption: the process has stopped.
              if (error._tag === "None" || error.value instanceof RpcClientError.RpcClientError) gone()
              else resume(Effect.fail(error.value as Exclude<E, RpcClientError.RpcClientError> | PeerGone))
            })
            return Effect.sync(() => {
              connection.waiting.delete(gone)
              fiber.interruptUnsafe()
            })
          })
        )

      let prepare: Prepare = () => Effect.void
      return Peers.of({
        search: (address, partition, query) => using(address, (client) => client.PeerSearch({ partition, ...query })),
        handOver: (address, partitions) => using(address, (client) => client.PeerHandOver({ partitions })),
        prepare: (address, partitions) => using(address, (client) => client.PeerPrepare({ partitions })),
        prepareWith: (next) => {
          prepare = next
        },
        prepareHere: (partitions) => prepare(partitions)
      })
    })
  )

  /** How a runner answers. */
  static readonly handlers = PeerRpcs.toLayer(
    Effect.gen(function* () {
      const local = yield* LocalActors
      const peers = yield* Peers
      const scope = yield* Effect.scope
      return {
        PeerSearch: ({ partition, ...query }) =>
          local.partitions.get(partition)?.search(query) ?? Effect.fail(new NotHere()),
        PeerHandOver: ({ partitions }) =>
          Effect.forEach(partitions, (partition) => local.partitions.get(partition)?.handOver ?? Effect.void, {
            concurrency: handedOverAtOnce,
            discard: true
          }).pipe(
            // Also where the one who asks does not wait any longer: it is not begun anew when the partition closes.
            Effect.forkIn(scope),
            Effect.flatMap(Fiber.join)
          ),
        PeerPrepare: ({ partitions }) => peers.prepareHere(partitions)
      }
    })
  )
}

/** Partitions whose snapshots are taken at once for another process. */
const handedOverAtOnce = 4

type PeerClient = RpcClient.FromGroup<typeof PeerRpcs, RpcClientError.RpcClientError>

interface Connection {
  client: PeerClient | undefined
  opened: Effect.Effect<PeerClient, PeerGone>
  readonly scope: Scope.Closeable
  /** Told when it is given up. */
  readonly waiting: Set<() => void>
}
