/**
 * A wrapper around any object store that fails by a seed, the way disks and networks do: before the effect, after it, with
 * the effect coming late, with no space, with a failing fsync, with damaged reads, and for good.
 */
import { Context, Effect, Fiber, Layer } from "effect"
import {
  type CreateOptions,
  type ListedObject,
  type ObjectBody,
  ObjectStore,
  type StoredObject,
  StoreFailure,
  withFileOf
} from "../../src/tiers/ObjectStore.ts"

/** What a test sets while it runs. Shares are from 0 to 1. */
export class Faults {
  readonly seed: number
  readonly random: () => number
  /** Any call fails; nothing happened, and it says so. */
  failShare = 0
  /** A write fails as uncertain and did not happen. */
  dropShare = 0
  /** A write fails as uncertain and did happen. */
  doubtShare = 0
  /** A write fails as uncertain and happens later. */
  lateShare = 0
  /** A read gives a flipped bit. */
  corruptShare = 0
  /** Turns of the scheduler that a call takes before and after its effect, at most. */
  turnsMax = 0
  /** No space is left for writes. */
  full = false
  /** The fsync of each write fails: half of them are taken back, of the others nobody knows. */
  fsyncFails = false
  /** Calls until the process is dead; the last of them has its effect where `crashAfterEffect`. */
  callsLeft = Number.POSITIVE_INFINITY
  crashAfterEffect = false
  /** Calls made so far, as `operation key`. */
  readonly calls: Array<string> = []
  readonly late: Array<Fiber.Fiber<unknown, unknown>> = []

  constructor(seed: number) {
    this.seed = seed
    this.random = seededRandom(seed)
  }

  get dead(): boolean {
    return this.callsLeft <= 0
  }

  /** No more faults; what was late has arrived. */
  readonly heal: Effect.Effect<void> = Effect.suspend(() => {
    Object.assign(this, { failShare: 0, dropShare: 0, doubtShare: 0, lateShare: 0, corruptShare: 0 })
    Object.assign(this, { turnsMax: 0, full: false, fsyncFails: false, callsLeft: Number.POSITIVE_INFINITY })
    return Effect.forEach(this.late.splice(0), (fiber) => Fiber.await(fiber), { discard: true })
  })
}

/** The faults of the store that {@link layer} made. */
export class StoreFaults extends Context.Service<StoreFaults, Faults>()("test/tiers/StoreFaults") {}

/** Puts faults between a store and its users. */
export const layer = (seed: number): Layer.Layer<ObjectStore | StoreFaults, never, ObjectStore> =>
  Layer.effectContext(
    Effect.map(ObjectStore, (inner) => {
      const faults = new Faults(seed)
      return Context.make(ObjectStore, withFaults(inner, faults)).pipe(Context.add(StoreFaults, faults))
    })
  )

export const withFaults = (inner: ObjectStore["Service"], faults: Faults): ObjectStore["Service"] => {
  const chance = (share: number): boolean => share > 0 && faults.random() < share
  const failure = (operation: string, key: string, detail: string, uncertain: boolean) =>
    new StoreFailure({ operation, key, detail: `injected: ${detail} (seed ${faults.seed})`, uncertain })

  const turns = Effect.suspend(() => {
    if (faults.turnsMax === 0) return Effect.void
    const times = Math.floor(faults.random() * faults.turnsMax)
    return Effect.yieldNow.pipe(Effect.repeat({ times }), Effect.asVoid)
  })

  const call = <A, E>(
    operation: string,
    key: string,
    effect: Effect.Effect<A, E>,
    write: boolean
  ): Effect.Effect<A, E | StoreFailure> =>
    Effect.gen(function* () {
      faults.calls.push(`${operation} ${key}`)
      if (faults.dead) return yield* failure(operation, key, "dead", true)
      faults.callsLeft -= 1
      if (faults.dead) {
        if (faults.crashAfterEffect) yield* Effect.exit(effect)
        return yield* failure(operation, key, "died", true)
      }
      yield* turns
      if (chance(faults.failShare)) return yield* failure(operation, key, "refused", false)
      if (!write) {
        const read = yield* effect
        yield* turns
        return read
      }
      if (faults.full) return yield* failure(operation, key, "ENOSPC", false)
      if (faults.fsyncFails) {
        if (chance(0.5)) return yield* failure(operation, key, "fsync failed, taken back", false)
        yield* effect
        return yield* failure(operation, key, "fsync failed", true)
      }
      if (chance(faults.dropShare)) return yield* failure(operation, key, "timed out", true)
      if (chance(faults.lateShare)) {
        const delay = Effect.repeat(Effect.yieldNow, { times: Math.floor(faults.random() * 300) })
        faults.late.push(yield* Effect.forkDetach(Effect.andThen(delay, effect)))
        return yield* failure(operation, key, "timed out, arrives late", true)
      }
      const written = yield* effect
      if (chance(faults.doubtShare)) return yield* failure(operation, key, "timed out after the effect", true)
      yield* turns
      return written
    })

  const corrupted = (stored: StoredObject): StoredObject => {
    if (stored.body.length === 0 || !chance(faults.corruptShare)) return stored
    const body = new Uint8Array(stored.body)
    const at = Math.floor(faults.random() * body.length)
    body[at] = (body[at] as number) ^ (1 << Math.floor(faults.random() * 8))
    return { ...stored, body }
  }

  const localPath: ObjectStore["Service"]["localPath"] = (key) =>
    Effect.andThen(call("localPath", key, Effect.void, false), inner.localPath(key))

  return ObjectStore.of({
    create: (key: string, body: ObjectBody, options?: CreateOptions) =>
      call("create", key, inner.create(key, body, options), true),
    replace: (key, body, expected) => call("replace", key, inner.replace(key, body, expected), true),
    get: (key, range) => Effect.map(call("get", key, inner.get(key, range), false), corrupted),
    list: (prefix, options) =>
      call<ReadonlyArray<ListedObject>, StoreFailure>("list", prefix, inner.list(prefix, options), false),
    delete: (key) => call("delete", key, inner.delete(key), true),
    localPath,
    withFile: withFileOf(localPath)
  })
}

/** Numbers from 0 to below 1, the same for the same seed (mulberry32). */
export const seededRandom = (seed: number): (() => number) => {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296
  }
}

/** Runs a test for each seed, one after the other; a failure says which it was. `RUVECTOR_TEST_SEED` runs that one alone. */
export const forEachSeed = <E, R>(
  count: number,
  body: (seed: number) => Effect.Effect<void, E, R>
): Effect.Effect<void, E, R> => {
  const only = process.env["RUVECTOR_TEST_SEED"]
  const seeds = only === undefined ? Array.from({ length: count }, (_, i) => i + 1) : [Number(only)]
  return Effect.forEach(
    seeds,
    (seed) =>
      Effect.onError(
        Effect.suspend(() => body(seed)),
        () => Effect.sync(() => console.error(`failed with RUVECTOR_TEST_SEED=${seed}`))
      ),
    { discard: true }
  )
}
