/**
 * Direct connections to the runners of the cluster, one to each beside the one that carries messages to actors: a search does not
 * wait behind a large insert, and is a smaller message.
 */
import { Cause, Context, Data, Effect, Exit, Fiber, Layer, Option, Scope } from "effect"
import type * as RunnerAddress from "effect/cluster/RunnerAddress"
import * as Runners from "effect/cluster/Runners"
import * as RpcClient from "effect/rpc/RpcClient"
import * as RpcClientError from "effect/rpc/RpcClientError"
import type { PartitionError, PartitionHits, PartitionQuery } from "../protocol/IndexPartition.ts"
import { type Moving, NotHere, type PeerAnswer, type PeerAsk, PeerRpcs } from "../protocol/Peer.ts"
import { LocalActors } from "./LocalActors.ts"
import { Membership } from "./Membership.ts"

/** There is no connection to the process, or it broke before the answer came. */
export class PeerGone extends Data.TaggedError("PeerGone") {}

/** What a process does when it is told of partitions that it is to own next. */
export type Prepare = (partitions: ReadonlyArray<Moving>) => Effect.Effect<void>

export class Peers extends Context.Service<
  Peers,
  {
    /** Begins a search, with no fiber that waits for it. What it answers gives it up. */
    readonly search: (
      context: Context.Context<never>,
      address: RunnerAddress.RunnerAddress,
      partition: string,
      query: PartitionQuery,
      done: (exit: Exit.Exit<PartitionHits, PartitionError | NotHere | PeerGone>) => void
    ) => () => void
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
      search: (_context, _address, _partition, _query, done) => {
        done(Exit.fail(new PeerGone()))
        return () => {}
      },
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
      const context = yield* Effect.context<never>()
      const runFork = Effect.runForkWith(context)
      const connections = new Map<string, Connection>()

      const connect = (address: RunnerAddress.RunnerAddress): Connection => {
        const name = nameOf(address)
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
            const there = new Set(membership.runners().map(({ address }) => nameOf(address)))
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
      const begin = <A, E>(
        context: Context.Context<never>,
        address: RunnerAddress.RunnerAddress,
        use: (client: PeerClient) => Effect.Effect<A, E>,
        done: (exit: Exit.Exit<A, Answered<E>>) => void
      ): (() => void) => {
        const connection = connect(address)
        const { client } = connection
        let isDone = false
        const end = (exit: Exit.Exit<A, Answered<E>>) => {
          if (isDone) return
          isDone = true
          connection.waiting.delete(gone)
          done(exit)
        }
        const gone = () => end(Exit.fail(new PeerGone()))
        connection.waiting.add(gone)
        const call = client === undefined ? Effect.flatMap(connection.opened, use) : use(client)
        const fiber = Effect.runForkWith(context)(call)
        fiber.addObserver((exit) => {
          if (Exit.isSuccess(exit)) return end(Exit.succeed(exit.value))
          const error = Exit.findErrorOption(exit)
          // Also an interruption: the process has stopped.
          if (error._tag === "None" || error.value instanceof RpcClientError.RpcClientError) gone()
          else end(Exit.fail(error.value as Answered<E>))
        })
        return () => {
          isDone = true
          connection.waiting.delete(gone)
          fiber.interruptUnsafe()
        }
      }
      const using = <A, E>(
        address: RunnerAddress.RunnerAddress,
        use: (client: PeerClient) => Effect.Effect<A, E>
      ): Effect.Effect<A, Answered<E>> =>
        Effect.withFiber((parent) =>
          Effect.callback((resume) => {
            const giveUp = begin(parent.context as Context.Context<never>, address, use, resume)
            return Effect.sync(giveUp)
          })
        )

      /** What is asked of a process in one turn of the event loop goes to it in one call: a call costs more than a search. */
      const gathered = new Map<string, Array<Asked>>()
      const search: Peers["Service"]["search"] = (context, address, partition, query, done) => {
        const asked: Asked = { ask: { partition, ...query }, context, done, giveUp: undefined, isGivenUp: false }
        const name = nameOf(address)
        const found = gathered.get(name)
        if (found === undefined) {
          const all = [asked]
          gathered.set(name, all)
          setImmediate(() => {
            gathered.delete(name)
            const left = all.filter(({ isGivenUp }) => !isGivenUp)
            for (let n = 0; n < left.length; n += searchesMax) send(address, left.slice(n, n + searchesMax))
          })
        } else found.push(asked)
        return () => {
          if (asked.isGivenUp) return
          asked.isGivenUp = true
          asked.giveUp?.()
        }
      }

      const send = (address: RunnerAddress.RunnerAddress, all: ReadonlyArray<Asked>): void => {
        const [only] = all
        if (only === undefined) return
        if (all.length === 1) {
          only.giveUp = begin(only.context, address, (client) => client.PeerSearch(only.ask), only.done)
          return
        }
        let left = all.length
        const giveUp = begin(
          context,
          address,
          (client) => client.PeerSearches({ asks: all.map(({ ask }) => ask) }),
          (exit) => {
            all.forEach(({ done, isGivenUp }, n) => {
              if (!isGivenUp) done(Exit.isSuccess(exit) ? exitOf(exit.value[n]) : Exit.failCause(exit.cause))
            })
          }
        )
        for (const asked of all) {
          asked.giveUp = () => {
            left -= 1
            if (left === 0) giveUp()
          }
        }
      }

      let prepare: Prepare = () => Effect.void
      return Peers.of({
        search,
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
      const search = ({ partition, ...query }: PeerAsk): Effect.Effect<PartitionHits, PartitionError | NotHere> =>
        local.partitions.get(partition)?.search(query) ?? Effect.fail(new NotHere())
      return {
        PeerSearch: search,
        PeerSearches: ({ asks }) =>
          Effect.forEach(
            asks,
            (ask) =>
              Effect.matchCause(search(ask), {
                onSuccess: (hits): PeerAnswer => ({ hits }),
                // Also where the partition has stopped, or met a defect: the others are answered, and it is asked elsewhere.
                onFailure: (cause): PeerAnswer => ({
                  error: Option.getOrElse(Cause.findErrorOption(cause), () => new NotHere())
                })
              }),
            { concurrency: "unbounded" }
          ),
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

/** Searches of one call, at most: all wait for the last of them. */
const searchesMax = 16

interface Asked {
  readonly ask: PeerAsk
  readonly context: Context.Context<never>
  readonly done: (exit: Exit.Exit<PartitionHits, PartitionError | NotHere | PeerGone>) => void
  giveUp: (() => void) | undefined
  isGivenUp: boolean
}

const exitOf = (answer: PeerAnswer | undefined): Exit.Exit<PartitionHits, PartitionError | NotHere | PeerGone> => {
  if (answer?.hits !== undefined) return Exit.succeed(answer.hits)
  return Exit.fail(answer?.error ?? new PeerGone())
}

const nameOf = ({ host, port }: RunnerAddress.RunnerAddress): string => `${host}:${port}`

type Answered<E> = Exclude<E, RpcClientError.RpcClientError> | PeerGone

interface Connection {
  client: PeerClient | undefined
  opened: Effect.Effect<PeerClient, PeerGone>
  readonly scope: Scope.Closeable
  /** Told when it is given up. */
  readonly waiting: Set<() => void>
}
