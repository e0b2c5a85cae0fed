/**
 * Which runners there are, who owns which shard, and what this process holds, as far as it knows. It stands between Effect
 * Cluster and the tables in Postgres, and bridges what would otherwise move every actor:
 *
 * **Outage of the database.** Nobody can take a shard then, so runners keep what they hold and all go on with the runners
 * they knew last, for `databaseOutageMillis`. Where only this process is cut off, others may take its shards all the same: an
 * owner's epoch in the store is what counts then, so whatever has one is asked to confirm it (`confirming`) as long as there is
 * doubt, and once afterwards. Locks are rows, so they outlive a restart of the database; those that others hold by then are
 * given up.
 *
 * **Handing over.** Locks that a runner gives up go in one statement, when the last of them is free, and who is to have them
 * looks for that often: both in place of a second that Effect Cluster waits.
 *
 * **Dead runners.** Who marks a runner as dead frees its locks with the same statement.
 */
import { Cause, Context, Deferred, Effect, Exit, HashRing, Layer, Metric, Option, type Scope, Semaphore } from "effect"
import * as ClusterError from "effect/cluster/ClusterError"
import type * as Runner from "effect/cluster/Runner"
import type * as RunnerAddress from "effect/cluster/RunnerAddress"
import * as RunnerStorage from "effect/cluster/RunnerStorage"
import * as ShardId from "effect/cluster/ShardId"
import * as ShardingConfig from "effect/cluster/ShardingConfig"
import * as SqlClient from "effect/sql/SqlClient"
import { Settings } from "../config.ts"
import { answerWithin, NotInTime } from "./answerWithin.ts"

/** The database is not answering. */
export interface Outage {
  /** Time of day at which it began. */
  readonly sinceMillis: number
}

export class Membership extends Context.Service<
  Membership,
  {
    /** This process among the runners; `undefined` for one that is alone or a gateway. */
    readonly own: RunnerAddress.RunnerAddress | undefined
    /** Runners that live, by what is known. */
    readonly runners: () => ReadonlyArray<Runner.Runner>
    /** Owners of a group's shards, the first shard's first; none where there is no runner. */
    readonly owners: (group: string) => ReadonlyArray<RunnerAddress.RunnerAddress>
    /** The same, as if there were one runner less or more. */
    readonly ownersWith: (change: RingChange, group: string) => ReadonlyArray<RunnerAddress.RunnerAddress>
    /** Calls the listener whenever the owners have changed, until what it answers is called. */
    readonly onChange: (listener: () => void) => () => void
    readonly outage: () => Outage | undefined
    /** Runs `check` whenever others may have taken what this process holds, for as long as the scope lives. */
    readonly confirming: (check: Effect.Effect<void>) => Effect.Effect<void, never, Scope.Scope>
    /** Looks now at which runners there are. */
    readonly look: Effect.Effect<void>
    /** From now on this runner may be given shards. Until then it is not among the runners. */
    readonly admit: Effect.Effect<void>
  }
>()("ruvector/shards/Membership") {
  /** A process that is alone. */
  static readonly layerAlone = Layer.succeed(
    Membership,
    Membership.of({
      own: undefined,
      runners: () => [],
      owners: () => [],
      ownersWith: () => [],
      onChange: () => () => {},
      outage: () => undefined,
      confirming: () => Effect.void,
      look: Effect.void,
      admit: Effect.void
    })
  )

  /** Stands before the storage of runners that it is given, whose tables' names begin with `prefix`; locks have to be rows. */
  static readonly layer = (prefix: string) => Layer.effectContext(Effect.suspend(() => make(prefix)))
}

export interface RingChange {
  readonly without?: RunnerAddress.RunnerAddress
  readonly plus?: Runner.Runner
}

/** Shards of each group: as many in all of a cluster, for good. */
export const shardsPerGroup = 300

/**
 * Between two looks at whether locks that another holds have become free, for how long it is looked for the first of them, and
 * from then on for the others.
 */
const freedCheckMillis = 40
const freedWaitMillis = 2_000
const freedGatherMillis = 400

/** Locks that are given up wait this long for others that are to be. */
const gatherMillis = 250

/** After an outage, heartbeats within which the runners known before count as there, though they have not been seen. */
const graceHeartbeats = 4

const databaseUp = Metric.gauge("ruvector_cluster_database_up", {
  description: "1 while the cluster's database answers"
})
const outages = Metric.counter("ruvector_cluster_outages", { description: "Times the cluster's database was gone" })
const shardsRetaken = Metric.counter("ruvector_cluster_shards_retaken", {
  description: "Shards whose lock was gone and was taken again, with nothing moved"
})
const shardsLost = Metric.counter("ruvector_cluster_shards_lost", {
  description: "Shards that another runner held when their lock was to be refreshed"
})

const make = Effect.fnUntraced(function* (prefix: string) {
  const settings = yield* Settings
  const storage = yield* RunnerStorage.RunnerStorage
  const sql = (yield* SqlClient.SqlClient).withoutTransforms()
  const config = yield* ShardingConfig.ShardingConfig
  const own = Option.getOrUndefined(config.runnerAddress)
  const runFork = Effect.runForkWith(yield* Effect.context<never>())
  const locks = sql(`${prefix}_locks`)
  const runnersTable = sql(`${prefix}_runners`)
  const ownName = own === undefined ? "" : nameOf(own)
  const gate = yield* Semaphore.make(1)
  const admitted = Deferred.makeUnsafe<void>()
  const context = Context.empty()

  let ownRunner: Runner.Runner | undefined
  /** As it was read last, and when. */
  let known: Array<readonly [Runner.Runner, boolean]> | undefined
  let graceUntil = 0
  let draining = false
  /** Locks that this process holds, by its own knowledge: not those it is giving up. */
  const held = new Set<string>()
  let rings = new Map<string, ReadonlyArray<RunnerAddress.RunnerAddress>>()
  const listeners = new Set<() => void>()

  let outage: (Outage & { readonly began: number }) | undefined
  databaseUp.updateUnsafe(1, context)
  const isBounded = () => outage !== undefined && performance.now() - outage.began < settings.databaseOutageMillis
  const failed = (cause: Cause.Cause<unknown>) =>
    Effect.suspend(() => {
      if (outage !== undefined) return Effect.void
      outage = { sinceMillis: Date.now(), began: performance.now() }
      databaseUp.updateUnsafe(0, context)
      outages.updateUnsafe(1, context)
      return Effect.logWarning(
        "The cluster's database does not answer. What is held stays; runners that die are not replaced meanwhile.",
        Cause.squash(cause)
      )
    })
  const recovered = Effect.suspend(() => {
    if (outage === undefined) return Effect.void
    const millis = Math.round(performance.now() - outage.began)
    outage = undefined
    graceUntil = performance.now() + graceHeartbeats * settings.runnerHeartbeatMillis
    databaseUp.updateUnsafe(1, context)
    confirmNext = true
    return Effect.logInfo("The cluster's database answers again", { outage_ms: millis, shards: held.size })
  })

  // --- What is known of the runners

  const publish = (runners: ReadonlyArray<readonly [Runner.Runner, boolean]>) => {
    const before = known
    known = [...runners]
    if (before !== undefined && signature(before) === signature(runners)) return
    rings = ringsOf(healthy(runners))
    for (const listener of [...listeners]) listener()
  }

  const getRunners = Effect.gen(function* () {
    const read = yield* bounded(settings.databaseQueryMillis, storage.getRunners)
    if (Exit.isFailure(read)) {
      yield* failed(read.cause)
      return known === undefined ? yield* read : known
    }
    if (outage !== undefined) {
      if (own === undefined) yield* recovered
      else yield* bounded(settings.databaseQueryMillis, retake([...held]))
    }
    let runners: Array<readonly [Runner.Runner, boolean]> = read.value
    if (performance.now() < graceUntil || outage !== undefined) {
      const seen = new Set(runners.map(([{ address }]) => nameOf(address)))
      const unseen = (known ?? []).filter(([{ address }]) => !seen.has(nameOf(address)))
      runners = [...runners, ...unseen]
      // Its row may have been cleared away as one that had not been heard of.
      if (ownRunner !== undefined && !draining && !seen.has(ownName)) {
        yield* bounded(settings.databaseQueryMillis, storage.register(ownRunner, true))
      }
    }
    publish(runners)
    return runners
  })

  // --- Locks

  /** Confirms locks, and takes again those that have gone and that nobody has. */
  const retake = (names: ReadonlyArray<string>) =>
    Effect.gen(function* () {
      const address = own as RunnerAddress.RunnerAddress
      const ids = names.map(shardIdOf)
      const still = new Set((yield* storage.refresh(address, ids)).map(String))
      const gone = ids.filter((id) => !still.has(String(id)) && held.has(String(id)))
      if (gone.length > 0) {
        const again = yield* storage.acquire(address, gone)
        for (const id of again) still.add(String(id))
        for (const id of gone) if (!still.has(String(id))) held.delete(String(id))
        shardsRetaken.updateUnsafe(again.length, context)
        shardsLost.updateUnsafe(gone.length - again.length, context)
        // Somebody may have had it in between.
        confirmNext = true
        yield* Effect.logWarning("Locks of shards were gone", {
          taken_again: again.length,
          lost: gone.length - again.length
        })
      }
      yield* recovered
      return still
    }).pipe(gate.withPermit)

  const refresh: Storage["refresh"] = (_, shardIds) =>
    Effect.gen(function* () {
      const ids = Array.from(shardIds)
      const still = yield* bounded(settings.databaseQueryMillis, retake(ids.map(String)))
      if (Exit.isSuccess(still)) return ids.filter((id) => still.value.has(String(id)))
      yield* failed(still.cause)
      return isBounded() ? ids : yield* Effect.failCause(still.cause)
    })

  const takenByOthers = (names: ReadonlyArray<string>) =>
    Effect.map(
      sql<{ readonly taken: number }>`
        SELECT COUNT(*)::int AS taken FROM ${locks}
        WHERE ${sql.in("shard_id", names)} AND address <> ${ownName}
          AND acquired_at >= NOW() - ${settings.shardLockMillis} * INTERVAL '1 millisecond'`,
      (rows) => rows[0]?.taken ?? 0
    )

  /** Whether this runner holds what another is to have. */
  const holdsOthers = (): boolean => {
    for (const name of held) {
      const { group, id } = shardIdOf(name)
      const owner = rings.get(group)?.[id - 1]
      if (owner !== undefined && nameOf(owner) !== ownName) return true
    }
    return false
  }

  /**
   * What is free by now, or becomes so while it is waited for: those who have it give it up one after the other, and who asks
   * waits for a second after each answer. Never fails: after a failure that would be minutes.
   */
  const acquire: Storage["acquire"] = (address, shardIds) =>
    Effect.gen(function* () {
      const ids = Array.from(shardIds)
      const names = ids.map(String)
      const ringsBefore = rings
      let until = performance.now() + freedWaitMillis
      let got: Array<ShardId.ShardId> = []
      for (;;) {
        const found = yield* bounded(settings.databaseQueryMillis, gate.withPermit(storage.acquire(address, ids)))
        if (Exit.isFailure(found)) {
          yield* failed(found.cause)
          return got
        }
        if (got.length === 0 && found.value.length > 0) until = Math.min(until, performance.now() + freedGatherMillis)
        got = found.value
        for (const id of got) held.add(String(id))
        const missing = names.length - got.length
        for (let others = missing; others === missing; ) {
          if (missing === 0 || performance.now() > until) return got
          // It lets go of what became another's meanwhile only after this.
          if (rings !== ringsBefore && holdsOthers()) return got
          yield* Effect.sleep(freedCheckMillis)
          const taken = yield* bounded(settings.databaseQueryMillis, takenByOthers(names))
          if (Exit.isFailure(taken)) return got
          others = taken.value
        }
      }
    })

  /** Locks being given up, and who waits for that. */
  let leaving = new Map<string, Deferred.Deferred<void, ClusterError.PersistenceError>>()
  let leavingSince = 0
  let leavingTimer: ReturnType<typeof setTimeout> | undefined

  const flush = () => {
    clearTimeout(leavingTimer)
    leavingTimer = undefined
    const now = leaving
    if (now.size === 0) return
    leaving = new Map()
    const deleted = sql`DELETE FROM ${locks} WHERE address = ${ownName} AND ${sql.in("shard_id", [...now.keys()])}`
    runFork(
      Effect.flatMap(bounded(settings.databaseQueryMillis, gate.withPermit(deleted)), (exit) =>
        Effect.sync(() => {
          for (const waiter of now.values()) {
            Deferred.doneUnsafe(
              waiter,
              Exit.isSuccess(exit)
                ? Effect.void
                : Effect.fail(new ClusterError.PersistenceError({ cause: Cause.squash(exit.cause) }))
            )
          }
        })
      )
    )
  }

  /** Whether all that this runner is to give up now waits to be. */
  const isGathered = (): boolean => (draining ? held.size === 0 : !holdsOthers())

  const release: Storage["release"] = (_, shardId) =>
    Effect.suspend(() => {
      const name = String(shardId)
      held.delete(name)
      const waiter = leaving.get(name) ?? Deferred.makeUnsafe<void, ClusterError.PersistenceError>()
      if (leaving.size === 0) leavingSince = performance.now()
      leaving.set(name, waiter)
      clearTimeout(leavingTimer)
      const wait = isGathered() ? 0 : Math.max(0, leavingSince + gatherMillis - performance.now())
      leavingTimer = setTimeout(flush, wait)
      return Deferred.await(waiter)
    })

  const setRunnerHealth: Storage["setRunnerHealth"] = (address, isHealthy) =>
    isHealthy
      ? storage.setRunnerHealth(address, true)
      : sql`
          WITH dead AS (UPDATE ${runnersTable} SET healthy = FALSE WHERE address = ${nameOf(address)} RETURNING address)
          DELETE FROM ${locks} WHERE address IN (SELECT address FROM dead)
        `.pipe(Effect.asVoid, ClusterError.PersistenceError.refail)

  const unregister: Storage["unregister"] = () =>
    Effect.suspend(() => {
      draining = true
      // Of others only those that no outage explains.
      const forgotten = settings.databaseOutageMillis + 10 * settings.shardLockMillis
      return sql`
        DELETE FROM ${runnersTable}
        WHERE address = ${ownName} OR last_heartbeat < NOW() - ${forgotten} * INTERVAL '1 millisecond'
      `.pipe(Effect.asVoid, ClusterError.PersistenceError.refail)
    })

  // --- Confirming what is held

  const checks = new Set<Effect.Effect<void>>()
  let confirmNext = false
  let awake = performance.now()
  const look = Effect.suspend(() => {
    const now = performance.now()
    // Who stood still may have been taken for dead.
    if (now - awake > settings.ownerCheckMillis + settings.runnerHeartbeatMillis * 2) confirmNext = true
    awake = now
    if (outage === undefined && !confirmNext) return Effect.void
    confirmNext = false
    return Effect.forEach([...checks], (check) => check, { concurrency: checksAtOnce, discard: true })
  })
  if (own !== undefined) {
    yield* look.pipe(Effect.andThen(Effect.sleep(settings.ownerCheckMillis)), Effect.forever, Effect.forkScoped)
  }

  const wrapped: Storage = {
    ...storage,
    getRunners,
    register: (runner, isHealthy) =>
      Effect.andThen(
        Deferred.await(admitted),
        Effect.suspend(() => {
          ownRunner = runner
          return storage.register(runner, isHealthy)
        })
      ),
    unregister,
    setRunnerHealth,
    acquire,
    refresh,
    release,
    releaseAll: (address) =>
      Effect.suspend(() => {
        held.clear()
        return storage.releaseAll(address)
      })
  }

  const membership = Membership.of({
    own,
    runners: () => healthy(known ?? []),
    owners: (group) => rings.get(group) ?? [],
    ownersWith: ({ without, plus }, group) => {
      const others = healthy(known ?? []).filter(
        ({ address }) => without === undefined || nameOf(address) !== nameOf(without)
      )
      return ringsOf(plus === undefined ? others : [...others, plus]).get(group) ?? []
    },
    onChange: (listener) => {
      listeners.add(listener)
      return () => listeners.delete(listener)
    },
    outage: () => outage,
    confirming: (check) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          checks.add(check)
        }),
        () => Effect.sync(() => checks.delete(check))
      ),
    look: Effect.ignore(getRunners),
    admit: Effect.asVoid(Deferred.succeed(admitted, undefined))
  })
  return Context.make(Membership, membership).pipe(Context.add(RunnerStorage.RunnerStorage, wrapped))
})

type Storage = RunnerStorage.RunnerStorage["Service"]

/** Actors asked at once to confirm what they own. */
const checksAtOnce = 16

const nameOf = ({ host, port }: RunnerAddress.RunnerAddress): string => `${host}:${port}`

const shardIdOf = (name: string) => ShardId.fromString(name)

const healthy = (runners: ReadonlyArray<readonly [Runner.Runner, boolean]>): ReadonlyArray<Runner.Runner> =>
  runners.flatMap(([runner, isHealthy]) => (isHealthy ? [runner] : []))

const signature = (runners: ReadonlyArray<readonly [Runner.Runner, boolean]>): string =>
  healthy(runners)
    .map(({ address, weight }) => `${nameOf(address)}*${weight}`)
    .sort()
    .join()

/** As `Sharding` deals out the shards. */
const ringsOf = (runners: ReadonlyArray<Runner.Runner>): Map<string, ReadonlyArray<RunnerAddress.RunnerAddress>> => {
  const rings = new Map<string, HashRing.HashRing<RunnerAddress.RunnerAddress>>()
  for (const { address, groups, weight } of runners) {
    for (const group of groups) {
      const ring = rings.get(group) ?? HashRing.make<RunnerAddress.RunnerAddress>()
      rings.set(group, HashRing.add(ring, address, { weight }))
    }
  }
  return new Map(Array.from(rings, ([group, ring]) => [group, HashRing.getShards(ring, shardsPerGroup) ?? []]))
}

/** The exit of an effect on the database, or that it took too long (`answerWithin`). */
const bounded = <A, E>(
  millis: number,
  effect: Effect.Effect<A, E>
): Effect.Effect<Exit.Exit<A, E | ClusterError.PersistenceError>> =>
  Effect.exit(
    Effect.catchIf(
      answerWithin(millis, effect),
      (error): error is NotInTime => error instanceof NotInTime,
      (cause) => Effect.fail(new ClusterError.PersistenceError({ cause }))
    )
  )
