/**
 * Hundreds of seeded faults over one running load: nothing acknowledged is lost, no wrong vector is ever returned, every
 * damage is detected and named. `RUVECTOR_FAULTS` sets how many, `RUVECTOR_SEED` which, `RUVECTOR_FAULTS_FLAGS` with which
 * flags of the server beside those of the test.
 */
import { mkdir, readdir } from "node:fs/promises"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import * as FileObjectStore from "../../src/tiers/FileObjectStore.ts"
import * as GcsObjectStore from "../../src/tiers/GcsObjectStore.ts"
import { startFakeGcs, withoutFakeGcs } from "../support/FakeGcs.ts"
import { type FlakyProxy, startFlakyProxy } from "../support/FlakyProxy.ts"
import { type RedisServer, skipRedis, startRedis } from "../support/RedisServer.ts"
import { type Random, seeded, seedOf } from "../support/Seeded.ts"
import { ready, type ServerProcess, withDirectory } from "../support/ServerProcess.ts"
import {
  cacheDamageKinds,
  type Damage,
  type DamageKind,
  damage,
  damageKinds,
  leaveGarbage,
  leaveLock,
  type Place
} from "./damageAtRest.ts"
import { startFailingServer, tell } from "./failingServer.ts"
import { type CollectionSpec, FaultyLoad } from "./faultyLoad.ts"

const faults = Number(process.env["RUVECTOR_FAULTS"] ?? (process.env["RUVECTOR_CI"] === undefined ? 40 : 200))
/** Each costs more where every object is a request. */
const bucketFaults = Math.ceil(faults / 4)
const moreFlags = (process.env["RUVECTOR_FAULTS_FLAGS"] ?? "").split(" ").filter((word) => word !== "")

const collections: ReadonlyArray<CollectionSpec> = [
  { name: "alpha", dimensions: 8, metric: "cosine", partitions: 1, records: 40 },
  { name: "beta", dimensions: 12, metric: "l2", partitions: 2, records: 40 },
  { name: "gamma", dimensions: 6, metric: "ip", partitions: 3, records: 60 }
]

/** Snapshots as often as they can be; the log after them is short, and often empty. */
const loadFlags = ["--snapshot-ops", "100", "--snapshot-share-percent", "1", "--snapshot-idle-millis", "700"]
/** Looks at the damage and makes no snapshot of what is there meanwhile. */
const inspectionFlags = ["--snapshot-ops", "10000000", "--snapshot-idle-millis", "3600000"]

/** Faults of the bucket's requests, a moment of which is one fault. */
const networkFaults = ["dropBefore", "dropAfter", "late", "refuse", "refuseAfter", "truncate", "flip"] as const

type DiskFault = "disk full" | "failing fsync" | "unreadable disk" | "lost answers"
type OnlineFault = DiskFault | "network" | "clock" | "thread" | "redis killed" | "redis stalled"
type Fault = OnlineFault | DamageKind | "kill -9" | "SIGTERM" | "garbage" | "lock left"

/** What a run is made of. */
interface Setting {
  readonly place: Place
  readonly faults: number
  readonly flags: ReadonlyArray<string>
  readonly environment: Record<string, string>
  /** Between the server and its bucket. */
  readonly network: FlakyProxy | undefined
  readonly redis: RedisServer | undefined
}

const withRedis = async (use: (redis: RedisServer | undefined) => Promise<void>): Promise<void> => {
  const redis = skipRedis ? undefined : await startRedis()
  try {
    await use(redis)
  } finally {
    await redis?.stop()
  }
}

const runWith = async (setting: Setting, source: Random): Promise<void> => {
  const run = new Run(setting, source)
  try {
    await run.go()
  } finally {
    await run.end()
  }
}

describe("a load on a server that fails", () => {
  it(
    `on a directory, ${faults} faults: nothing acknowledged is lost, nothing wrong is returned, damage is named`,
    {
      timeout: 900_000
    },
    () =>
      withDirectory((local) =>
        seeded(seedOf(20_261_125), (source) =>
          withRedis((redis) => {
            const store = FileObjectStore.layer({ directory: join(local, "objects") })
            const place = { data: local, local, store, inFiles: true }
            return runWith({ place, faults, flags: [], environment: {}, network: undefined, redis }, source)
          })
        )
      )
  )

  it.skipIf(withoutFakeGcs())(`on a bucket, ${bucketFaults} faults: the same`, { timeout: 900_000 }, () =>
    withDirectory((local) =>
      seeded(seedOf(20_261_126), (source) =>
        withRedis(async (redis) => {
          const gcs = await startFakeGcs()
          const network = await startFlakyProxy(gcs.url, source.next)
          try {
            await gcs.createBucket("faults")
            const data = "gs://faults/run"
            const scratch = join(local, "aside")
            await mkdir(scratch)
            const store = GcsObjectStore.layer({ url: data, endpoint: gcs.url, scratch, ...directly })
            const cache = join(local, "cache")
            const place = { data, local: cache, store, inFiles: false }
            const flags = ["--cache-dir", cache, ...impatient]
            const environment = { STORAGE_EMULATOR_HOST: network.url }
            await runWith({ place, faults: bucketFaults, flags, environment, network, redis }, source)
          } finally {
            await network.stop()
            await gcs.stop()
          }
        })
      )
    )
  )
})

/** How the test itself reaches the bucket. */
const directly = {
  connectionsMax: 16,
  requestMillis: 10_000,
  attemptsMax: 4,
  retryMillis: 10_000,
  resumableBytes: 16_777_216,
  downloadBytes: 8_388_608
}
/** A server that gives up soon, so that writes are left in doubt. */
const impatient = ["--store-request-millis", "500", "--store-attempts-max", "2", "--store-retry-millis", "500"]

class Run {
  readonly #setting: Setting
  readonly #source: Random
  readonly #load: FaultyLoad
  readonly #met = new Map<Fault, number>()
  #server: ServerProcess | undefined
  #uids = new Map<string, string>()

  constructor(setting: Setting, source: Random) {
    this.#setting = setting
    this.#source = source
    this.#load = new FaultyLoad(collections, source)
  }

  async go(): Promise<void> {
    const load = this.#load
    const { faults } = this.#setting
    let server = await this.#start(loadFlags)
    const { ended } = await load.begin(server.base)
    const { collections: made } = (await (await fetch(`${server.base}/api/v1/collections`)).json()) as {
      collections: ReadonlyArray<{ name: string; uid: string }>
    }
    for (const { name, uid } of made) this.#uids.set(uid, name)
    while (this.#count() < faults) {
      load.open(server.base)
      const online = 1 + this.#source.below(4)
      for (let i = 0; i < online && this.#count() < faults; i++) await this.#online(server)
      await pause(40 + this.#source.below(80))
      await this.#stop(server)
      const planted = await this.#atRest()
      server = await this.#start(loadFlags)
      await this.#whole(server, planted)
    }
    load.stop()
    await ended
    await this.#whole(server, [])
    assert.strictEqual(await server.stop("SIGTERM"), 0)
    const { acknowledged, reads, searches, hits } = load.counts
    console.log(
      `${this.#count()} faults (${[...this.#met].map(([fault, n]) => `${fault} ${n}`).join(", ")}); ${JSON.stringify(load.counts)}`
    )
    assert.isAbove(acknowledged, faults, "the load wrote")
    assert.isAbove(reads, faults, "the load read")
    assert.isAbove(searches, faults, "the load searched")
    assert.isAbove(hits, faults)
  }

  async end(): Promise<void> {
    this.#load.stop()
    const server = this.#server
    if (server?.process.exitCode === null && server.process.signalCode === null) await server.stop("SIGKILL")
  }

  #count(): number {
    return [...this.#met.values()].reduce((sum, n) => sum + n, 0)
  }

  #meet(fault: Fault): void {
    this.#met.set(fault, (this.#met.get(fault) ?? 0) + 1)
  }

  async #start(given: ReadonlyArray<string>): Promise<ServerProcess> {
    const { place, flags, environment, redis } = this.#setting
    const warm = redis === undefined ? [] : ["--redis-url", redis.url, "--redis-timeout-millis", "50"]
    this.#server = await startFailingServer(place.data, [...given, ...flags, ...warm, ...moreFlags], environment)
    return this.#server
  }

  /** Something fails for a moment, and is well again; the server goes on through it. */
  async #online(server: ServerProcess): Promise<void> {
    const source = this.#source
    const disks = {
      "disk full": "full",
      "failing fsync": "fsync",
      "unreadable disk": "read",
      "lost answers": "answers"
    } as const
    const { network, redis } = this.#setting
    const kinds: Array<OnlineFault> = ["clock", "thread"]
    if (network === undefined) kinds.push("disk full", "failing fsync", "unreadable disk", "lost answers")
    else kinds.push("network", "network", "network")
    if (redis !== undefined) kinds.push("redis killed", "redis stalled")
    const kind = source.pick(kinds)
    this.#meet(kind)
    const moment = () => pause(30 + source.below(90))
    switch (kind) {
      case "clock":
        await tell(server, { wallMillis: source.below(7_200_000) - 3_600_000, monotonicMillis: source.below(20_000) })
        break
      case "thread":
        await tell(server, { killThread: true })
        break
      case "network": {
        if (network === undefined) break
        const share = 0.2 + source.next() * 0.8
        network.decide = () => (source.next() < share ? source.pick(networkFaults) : "pass")
        await moment()
        network.decide = () => "pass"
        break
      }
      case "redis killed":
        await redis?.kill()
        await moment()
        await redis?.start()
        break
      case "redis stalled":
        redis?.suspend()
        await moment()
        redis?.resume()
        break
      default:
        await tell(server, { disk: disks[kind], share: 0.2 + source.next() * 0.8 })
        await moment()
        await tell(server, { disk: "none" })
    }
    await moment()
    assert.isNull(server.process.exitCode, `the server ended by itself: ${server.output().slice(-2_000)}`)
  }

  async #stop(server: ServerProcess): Promise<void> {
    const kill = this.#source.next() < 0.7
    this.#meet(kill ? "kill -9" : "SIGTERM")
    const ended = server.stop(kill ? "SIGKILL" : "SIGTERM")
    // What is under way meets it; a moment later nobody would be there to be asked.
    if (!kill) await pause(this.#source.below(30))
    this.#load.close()
    assert.strictEqual(await ended, kill ? "SIGKILL" : 0, server.output().slice(-2_000))
    await this.#load.quiet()
    await this.#setting.network?.settled()
    this.#fail()
  }

  /** Damage while the server is down. What stops a partition is looked at, and put back. */
  async #atRest(): Promise<ReadonlyArray<Damage>> {
    const source = this.#source
    const { place, faults } = this.#setting
    const planted: Array<Damage> = []
    const untouched = (uid: string, partition: number) =>
      this.#uids.has(uid) && !planted.some((other) => other.uid === uid && other.partition === partition)
    const wanted = source.below(4)
    for (let i = 0; i < wanted && this.#count() < faults; i++) {
      const ofCache = place.inFiles ? [] : [...cacheDamageKinds, ...cacheDamageKinds, ...cacheDamageKinds]
      const kind = source.pick(["garbage", "lock left", ...damageKinds, ...damageKinds, ...ofCache] as const)
      if (kind === "garbage") await leaveGarbage(place, source)
      else if (kind === "lock left") await leaveLock(place)
      else {
        const done = await damage(place, kind, untouched, source)
        if (done === undefined) continue
        planted.push(done)
      }
      this.#meet(kind)
    }
    const stopping = planted.filter(({ outcome }) => outcome !== "passed over")
    if (stopping.length === 0) return planted
    const server = await this.#start(inspectionFlags)
    for (const { uid, partition, object, kind, outcome } of stopping) {
      const collection = this.#uids.get(uid) as string
      const id = this.#load.idIn(collection, partition)
      // Opens the partition, where the start has stopped at another's damage before.
      const answer = await fetch(`${server.base}/api/v1/embed/${id}?collection=${collection}`)
      await this.#named(server, object, kind)
      if (outcome === "cut") {
        assert.include(server.output(), "was cut off")
        continue
      }
      const body = (await answer.json()) as { code: string; detail: string }
      assert.strictEqual(body.code, "partition_corrupt", `${kind} ${object}: ${JSON.stringify(body)}`)
      assert.include(body.detail, object)
    }
    const passedOver = planted.filter(({ outcome }) => outcome === "passed over")
    for (const { uid, partition, object, kind } of passedOver) {
      const collection = this.#uids.get(uid) as string
      await fetch(`${server.base}/api/v1/embed/${this.#load.idIn(collection, partition)}?collection=${collection}`)
      await this.#named(server, object, kind)
    }
    await server.stop("SIGKILL")
    for (const { restore } of stopping) await restore()
    return []
  }

  /** Waits until the log names an object. */
  async #named(server: ServerProcess, object: string, kind: string): Promise<void> {
    for (let attempt = 0; attempt < 400; attempt++) {
      if (server.output().includes(object)) return
      await pause(25)
    }
    assert.fail(`${kind}: the log does not name ${object}: ${server.output().slice(-3_000)}`)
  }

  /** All is there, and what was passed over was named. */
  async #whole(server: ServerProcess, planted: ReadonlyArray<Damage>): Promise<void> {
    await ready(server.base, 60_000)
    await this.#load.quiet()
    await this.#load.verify(server.base)
    for (const { object, kind } of planted) await this.#named(server, object, kind)
    const left = (await readdir(join(this.#setting.place.local, "scratch"))).filter((name) =>
      name.startsWith("garbage")
    )
    assert.deepStrictEqual(left, [], "scratch files of an earlier life")
    this.#fail()
  }

  #fail(): void {
    const { violations } = this.#load
    if (violations.length === 0) return
    const met = [...this.#met].map(([fault, n]) => `${fault} ${n}`).join(", ")
    assert.fail(
      `after ${this.#count()} faults (${met}):\n${violations.slice(0, 10).join("\n")}\n${this.#server?.output().slice(-3_000)}`
    )
  }
}

const pause = (millis: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, millis))
