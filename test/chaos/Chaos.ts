/**
 * One run: a cluster of real processes, clients on it, the faults of the seed's schedule, and in the end what the checkers say to
 * all that was recorded.
 */
import { appendFileSync, mkdirSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { VectorDB } from "../../src/client/index.ts"
import { partitionOf } from "../../src/shards/PartitionMap.ts"
import { random } from "../support/Seeded.ts"
import { type Clients, collection, dimensions, prepare, probeIds, startClients } from "./Clients.ts"
import { checkFeed, checkMembers, membersOf } from "./feeds.ts"
import { History, type Violation } from "./History.ts"
import { injectionOf } from "./injection.ts"
import { type Nodes, startNodes } from "./Nodes.ts"
import { nearestTo, recordsOf } from "./nearest.ts"
import { Prober } from "./Prober.ts"
import { changesOf, checkEffects, checkOwners, type PartitionHistory } from "./partitionHistory.ts"
import { readLogs } from "./readLogs.ts"
import { checkRegisters } from "./registers.ts"
import { type Fault, type FaultKind, networkFaults, scheduleOf } from "./Schedule.ts"

export interface ChaosOptions {
  readonly seed: number
  readonly durationMillis: number
  readonly kinds: ReadonlyArray<FaultKind>
  /** For data, logs and the report. */
  readonly directory: string
  readonly gateways?: number
  readonly runners?: number
  readonly partitions?: number
  readonly clients?: number
  readonly pauseMillis?: number
  readonly probeMillis?: number
  readonly quietMillis?: number
  readonly pausesMillis?: readonly [number, number]
  readonly postgresDownMillis?: number
  /** In place of a schedule by the seed; each begins when it is its time and the one before has ended. */
  readonly faults?: ReadonlyArray<Fault>
  readonly shardLockMillis?: number
  readonly flags?: ReadonlyArray<string>
  readonly namespaces?: boolean
  readonly print: (line: string) => void
}

/** A fault that happened. */
export interface Injected extends Fault {
  readonly begin: number
  /** When what was done to the cluster was undone: a node that was killed is ready again. */
  readonly end: number
  /**
   * From the beginning until every partition answered again, while it lasted if that was long enough, else after it too;
   * `undefined`: it did not, before the next fault.
   */
  readonly recoveredMillis: number | undefined
  /** The longest time in which one partition did not answer, from the beginning on. */
  readonly pauseMillis: number
  /** The same, while the fault lasted, and from then on: while a node was gone, and when it came back. */
  readonly lossPauseMillis: number
  readonly returnPauseMillis: number
  /** What went wrong in doing it. */
  readonly failed: string | undefined
}

export interface Verdict {
  readonly seed: number
  readonly network: Nodes["network"]["kind"]
  readonly durationMillis: number
  readonly faults: ReadonlyArray<Injected>
  readonly skipped: ReadonlyArray<FaultKind>
  readonly violations: ReadonlyArray<Violation>
  readonly operations: number
  readonly readsChecked: number
  readonly changesChecked: number
  /** Of calls no part of which was in the window of a fault. */
  readonly callsOutside: number
  readonly failedOutside: number
  /** Of all calls. */
  readonly calls: number
  readonly failed: number
  readonly failures: Readonly<Record<string, number>>
}

/** A window of a fault ends so long after the fault. */
export const windowMillis = 10_000

/** After a fault's end it is waited so long, at most, for every partition to answer. */
const settleMillis = 10_000

/** Probes younger than that may still be under way. */
const probeMillisMax = 1_500

/** After a fault's end, before it is looked whether all is well. */
const lookMillis = 2_500

/** Followers and subscribers may take so long to have everything, once nothing is written. */
const catchUpMillis = 60_000

export const runChaos = async (options: ChaosOptions): Promise<Verdict> => {
  const { directory, kinds, print, seed } = options
  const partitions = options.partitions ?? 6
  const shardLockMillis = options.shardLockMillis ?? 10_000
  mkdirSync(directory, { recursive: true })
  const nodes = await startNodes({
    directory,
    gateways: options.gateways ?? 2,
    runners: options.runners ?? 3,
    flags: [
      "--shard-lock-millis",
      `${shardLockMillis}`,
      "--change-retention-millis",
      "86400000",
      ...(options.flags ?? [])
    ],
    ...(options.namespaces === undefined ? {} : { namespaces: options.namespaces })
  })
  const started = performance.now()
  const now = () => performance.now() - started
  const note = (line: string) => {
    const text = `[${(now() / 1_000).toFixed(1).padStart(7)} s] ${line}`
    // As the nodes' logs are, by the time of day.
    appendFileSync(join(directory, "chaos.log"), `${new Date().toISOString()} ${text}\n`)
    print(text)
  }
  let clients: Clients | undefined
  let prober: Prober | undefined
  try {
    const skipped = nodes.network.kind === "namespaces" ? [] : kinds.filter((kind) => networkFaults.has(kind))
    if (skipped.length > 0) {
      note(`skipped: ${skipped.join(", ")}: they need network namespaces (root on Linux, with ip and nsenter)`)
    }
    const bases = nodes.gateways.map(({ base }) => base)
    await prepare(bases, partitions)
    const history = new History()
    clients = startClients({
      bases,
      history,
      seed,
      clients: options.clients ?? 6,
      keys: 30,
      pauseMillis: options.pauseMillis ?? 40,
      partitions,
      followers: 2,
      subscribers: 2,
      now
    })
    prober = new Prober({
      gateways: nodes.gateways,
      collection,
      ids: probeIds(partitions),
      dimensions,
      everyMillis: options.probeMillis ?? 250,
      now
    })

    const planned = scheduleOf({
      source: random(seed),
      durationMillis: options.durationMillis,
      kinds: kinds.filter((kind) => !skipped.includes(kind)),
      gateways: nodes.gateways.map(({ name }) => name),
      runners: nodes.runners.map(({ name }) => name),
      shardLockMillis,
      quietMillis: options.quietMillis ?? 10_000,
      postgresDownMillis: options.postgresDownMillis ?? 60_000,
      pauseMillis: options.pausesMillis ?? [20_000, 30_000]
    })
    const faults: Array<Injected> = []
    for (const fault of options.faults ?? planned) {
      await until(() => now() >= fault.beginMillis)
      faults.push(await inject(fault, nodes, prober, now, note))
    }
    await until(() => now() >= options.durationMillis)

    note("no more writes")
    prober.close()
    await clients.quiet()
    note("reading every key")
    await clients.readAll()
    const violations: Array<Violation> = [...history.violations, ...checkRegisters(history.writes, history.reads)]
    const db = new VectorDB({ endpoint: bases, collection })
    const { uid } = (await db.collections.get(collection, { deadlineMillis: 60_000 })) ?? { uid: "" }
    note("reading the logs")
    const logs = await readLogs(join(nodes.data, "objects"), uid, partitions)
    violations.push(...(await checkLogs(logs, history, clients, db)))
    await db.close()
    note("stopping")
    const codes = await Promise.all(nodes.all.map((node) => node.end("SIGTERM")))
    codes.forEach((code, n) => {
      const what = `${nodes.all[n]?.name} ended by ${code === "SIGKILL" ? "nothing but SIGKILL" : code} when it was told to stop`
      if (code !== 0) violations.push({ kind: "stop", what })
    })

    const verdict = verdictOf(options, nodes, faults, skipped, violations, history, logs)
    writeFileSync(join(directory, "violations.txt"), violations.map(({ kind, what }) => `${kind}: ${what}\n`).join(""))
    writeFileSync(join(directory, "history.json"), JSON.stringify({ ...history, faults, probes: prober.probes }))
    return verdict
  } finally {
    prober?.close()
    await clients?.close()
    await nodes.stop()
  }
}

const inject = async (
  fault: Fault,
  nodes: Nodes,
  prober: Prober,
  now: () => number,
  note: (line: string) => void
): Promise<Injected> => {
  const seconds = (millis: number) => `${(millis / 1_000).toFixed(2)} s`
  const name = `${fault.kind} of ${fault.targets.join(" and ")}`
  const amount = fault.amountMillis === 0 ? "" : `, ${fault.amountMillis} ms`
  const { undo, apply } = injectionOf(fault, nodes)
  const exempt = fault.targets.filter((target) => target.startsWith("gateway"))
  note(`${name}${amount}, for ${(fault.holdMillis / 1_000).toFixed(1)} s`)
  const begin = now()
  let failed: string | undefined
  try {
    await apply()
    await pause(fault.holdMillis)
  } catch (error) {
    failed = String(error)
  }
  const undone = now()
  const meanwhile = prober.recovered(begin, undone - probeMillisMax, exempt)
  try {
    await undo()
  } catch (error) {
    failed = String(error)
  }
  const end = now()
  const recovered = () => prober.recovered(begin, now() - probeMillisMax, exempt)
  await pause(lookMillis)
  await until(() => recovered() !== undefined, settleMillis - lookMillis)
  // What a node that comes back takes over moves once more: that is not what its loss took.
  const recoveredMillis = meanwhile === undefined || meanwhile === 0 ? recovered() : meanwhile
  const pauseMillis = prober.pause(begin, now() - probeMillisMax, exempt)
  const lossPauseMillis = prober.pause(begin, undone, exempt)
  const returnPauseMillis = prober.pause(undone, now() - probeMillisMax, exempt)
  note(
    `${name} has ended after ${((end - begin) / 1_000).toFixed(1)} s; ` +
      (recoveredMillis === undefined
        ? "not every partition answers yet"
        : recoveredMillis === 0
          ? "every partition answered all the time"
          : `every partition answered again ${seconds(recoveredMillis)} after it began`) +
      `, the longest wait was ${seconds(lossPauseMillis)}, and ${seconds(returnPauseMillis)} from then on` +
      (failed === undefined ? "" : `; ${failed}`)
  )
  return { ...fault, begin, end, recoveredMillis, pauseMillis, lossPauseMillis, returnPauseMillis, failed }
}

/** What is in the logs, against what was acknowledged and what followers and subscribers were told. */
const checkLogs = async (
  logs: ReadonlyArray<PartitionHistory>,
  history: History,
  clients: Clients,
  db: VectorDB
): Promise<ReadonlyArray<Violation>> => {
  const violations: Array<Violation> = []
  const partitions = logs.length
  for (const log of logs) violations.push(...checkOwners(log))
  const changes = logs.map(changesOf)
  violations.push(...checkEffects(changes.flat(), history.writes, clients.isWritten))

  const total = changes.reduce((sum, log) => sum + log.length, 0)
  await until(
    () => clients.feeds.every(({ events, failed }) => events.length >= total || failed !== undefined),
    catchUpMillis
  )
  for (const { events, failed, name } of clients.feeds) {
    if (failed !== undefined) violations.push({ kind: "feed gap", what: `${name} was ended: ${failed}` })
    violations.push(...checkFeed(name, events, changes, (id) => partitionOf(id, partitions)))
  }

  const records = recordsOf(logs)
  for (const { failed, k, name, query, ...subscription } of clients.subscriptions) {
    if (failed !== undefined) violations.push({ kind: "standing query", what: `${name} was ended: ${failed}` })
    const answer = nearestTo(query, records)
    const wrong = () => {
      const { members, violations } = membersOf(name, subscription.events)
      return [...violations, ...checkMembers(name, members, answer, k)]
    }
    await until(() => wrong().length === 0, failed === undefined ? catchUpMillis / 4 : 0)
    violations.push(...wrong())
    const fresh = await db.search(query, { k, ef: 1_000, deadlineMillis: 60_000 })
    const versions = new Map(records.map(({ id, version }) => [id, version]))
    const found = fresh.map(({ id, score }) => [id, { id, score, version: versions.get(id) ?? "none" }] as const)
    violations.push(...checkMembers(`a fresh search beside ${name}`, new Map(found), answer, k))
  }
  return violations
}

const verdictOf = (
  options: ChaosOptions,
  nodes: Nodes,
  faults: ReadonlyArray<Injected>,
  skipped: ReadonlyArray<FaultKind>,
  violations: ReadonlyArray<Violation>,
  history: History,
  logs: ReadonlyArray<PartitionHistory>
): Verdict => {
  const outside = history.calls.filter(({ completed, invoked }) =>
    faults.every(({ begin, end }) => completed < begin || invoked > end + windowMillis)
  )
  const failed = history.calls.filter((call) => call.failed !== undefined)
  const failures: Record<string, number> = {}
  for (const { failed: code } of failed) failures[code as string] = (failures[code as string] ?? 0) + 1
  return {
    seed: options.seed,
    network: nodes.network.kind,
    durationMillis: options.durationMillis,
    faults,
    skipped,
    violations,
    operations: history.writes.length,
    readsChecked: history.reads.length,
    changesChecked: logs.reduce((sum, { segments }) => sum + segments.reduce((n, { ops }) => n + ops.length, 0), 0),
    callsOutside: outside.length,
    failedOutside: outside.filter((call) => call.failed !== undefined).length,
    calls: history.calls.length,
    failed: failed.length,
    failures
  }
}

const pause = (millis: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, millis))

/** Waits until it is so, or for as long. */
const until = async (isSo: () => boolean, millis = Number.POSITIVE_INFINITY): Promise<void> => {
  const end = performance.now() + millis
  while (!isSo() && performance.now() < end) await pause(50)
}
