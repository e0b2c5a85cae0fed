/**
 * A vector thread: owns whole partitions and does all that is done with vectors. Plain TypeScript, no Effect, so that it
 * starts fast and stays small.
 *
 * Two lanes. Searches, reads and counts are answered when the thread looks. Everything else is work in steps, done in
 * slices between two looks. A slice ends after `insertSliceMillis` at the latest, and once something is asked, as soon as
 * work has had its share of the time. While searches never cease, work keeps that share: of those that wait, a look
 * answers as many as fit into the rest, and all that have waited for too long.
 */
import { parentPort, receiveMessageOnPort, workerData } from "node:worker_threads"
import { collectGarbage, collectGrown } from "./collectGarbage.ts"
import { memoryOf } from "./index/Assembler.ts"
import { BlockCache } from "./index/BlockCache.ts"
import { checkKernelOf } from "./index/CheckKernel.ts"
import { FileFault } from "./index/RecordsFile.ts"
import { type Hits, Resident } from "./index/Resident.ts"
import { rowKernelOf } from "./index/RowKernel.ts"
import { SearchDesk } from "./index/SearchDesk.ts"
import { sketchKernelOf } from "./index/SketchKernel.ts"
import {
  type Answer,
  atWork,
  type Command,
  type FromThread,
  hitWords,
  isBusy,
  mustStop,
  type OpenFiles,
  searchWords,
  type ThreadOptions,
  type ToThread,
  type WatchCommand,
  withMetadata,
  withVector
} from "./index/ThreadMessages.ts"
import type { Work } from "./index/Work.ts"

/** Share of the thread's time that work has while searches never cease. */
const workShare = 0.8
const workPerSearch = workShare / (1 - workShare)

/** A search that has waited so long is answered at the next look, whatever the share. */
const overdueMillis = 15

/** Every so many slices one goes to what a partition does of its own accord, though others are asked for work. */
const backgroundEverySlices = 8

/**
 * Answers sent in one message, at most, and how long the first of them waits for the others: longer where several times as
 * many searches wait still, since those wait for the thread and not for the answers. A message is dear to who takes it.
 */
const answersMax = 16
const answerDelayMillis = 0.3
const answerDelayMillisMax = 1
const waitingPerAnswer = 3

/** Standing queries that are searched anew before a segment is applied, at most; more are where nothing is asked. */
const searchesPerSegment = 8

/** How often the thread says how much memory it holds. */
const bytesEveryMillis = 250

/** Garbage is collected when so much has been let go of: at once where there is nothing else to do, else not more often than this. */
const collectBytes = 32 * 1_048_576
const collectEveryMillis = 1_000

/** How long the thread waits at the desk for the next search after one, before it waits for messages again. */
const lingerMillis = 100

/** After its start the thread compiles what it will need. */
const compileAfterMillis = 50

interface Search {
  readonly request: number
  readonly arrivedAt: number
  readonly seat: Seat
  readonly k: number
  readonly ef: number
  readonly flags: number
  readonly filter: string | undefined
  readonly vector: Float32Array
}

/** Something to do in steps for a partition, and what to answer. */
interface Job {
  readonly request: number
  readonly work: Work<Answer>
}

/** A partition in this thread. */
interface Seat {
  readonly number: number
  readonly partition: Resident
  /** Done in order, the first is under way. */
  readonly jobs: Array<Job>
  /** Whether the first job waits for a promise; nothing of the partition changes meanwhile. */
  waiting: boolean
  closed: boolean
  /** Searches with a filter, until the metadata index is there. */
  readonly parked: Map<number, Search>
}

const port = parentPort!
const {
  insertSliceMillis,
  graphFrom,
  blockCacheBytes,
  sketchFrom,
  shared,
  desk: deskMemory
} = workerData as ThreadOptions
const cache = new BlockCache(blockCacheBytes)

const seats = new Map<number, Seat>()
/** Seats with a step to do, taken in turn, a slice each. */
const ready: Array<Seat> = []
/** The seat whose slice it is; put back in the row afterwards. */
let running: Seat | undefined
let slices = 0
/** Closed partitions that wait for something nevertheless; the thread cannot end before. */
const leaving = new Set<Seat>()
let isStopping = false
/** Searches that wait, oldest first, by request. */
const searches = new Map<number, Search>()
const reads: Array<Command & { readonly kind: "get" | "stats" }> = []
/** Milliseconds that work is owed by the searches done since. */
let owedMillis = 0
let scheduled = false
const desk = deskMemory === undefined ? undefined : new SearchDesk(deskMemory)
/** The search that lies at the desk; 0 where there is none. */
let atDesk = 0
let deskUsedAt = Number.NEGATIVE_INFINITY

// --- Answers -----------------------------------------------------------------------------------------------------------

let answers: Array<Answer> = []
let hitHead: Array<number> = []
let hitIds: Array<string> = []
let hitScores: Array<Float32Array> = []
let hitMetadata: Array<string> = []
let hitVectors: Array<Float32Array> = []
let hitResults = 0
let hitComponents = 0
let waitingSince = 0
let bytesDue = false
let bytesSaidAt = 0

const answer = (one: Answer): void => {
  answers.push(one)
}

const flush = (): void => {
  if (hitHead.length === 0 && answers.length === 0 && !bytesDue) return
  const message: { -readonly [Key in keyof FromThread]: FromThread[Key] } = {}
  if (hitHead.length > 0) {
    message.hits = {
      head: hitHead,
      ids: hitIds,
      scores: concatenated(hitScores, hitResults),
      metadata: hitMetadata,
      vectors: concatenated(hitVectors, hitComponents)
    }
    hitHead = []
    hitIds = []
    hitScores = []
    hitMetadata = []
    hitVectors = []
    hitResults = 0
    hitComponents = 0
  }
  if (answers.length > 0) {
    message.answers = answers
    answers = []
    bytesDue ||= performance.now() - bytesSaidAt > bytesEveryMillis
  }
  if (bytesDue) {
    bytesDue = false
    bytesSaidAt = performance.now()
    message.bytes = cache.bytes
    for (const seat of seats.values()) message.bytes += seat.partition.bytes
  }
  port.postMessage(message)
}

const concatenated = (parts: ReadonlyArray<Float32Array>, length: number): Float32Array => {
  if (parts.length === 1) return parts[0]!
  const all = new Float32Array(length)
  let at = 0
  for (const part of parts) {
    all.set(part, at)
    at += part.length
  }
  return all
}

// --- The lane of searches ----------------------------------------------------------------------------------------------

const search = ({ request, seat, vector, k, ef, filter, flags }: Search): void => {
  Atomics.store(shared, atWork, seat.number)
  const { partition } = seat
  const { dimensions } = partition.spec
  if (vector.length !== dimensions) {
    answer({ kind: "failed", request, reason: "refused", detail: `a query of ${vector.length} components` })
    return
  }
  let hits: Hits
  try {
    hits = partition.search(vector, k, ef, filter, (flags & withMetadata) !== 0, (flags & withVector) !== 0)
  } catch (error) {
    const detail = messageOf(error)
    if (error instanceof FileFault) lose(seat, detail)
    answer({ kind: "failed", request, reason: error instanceof FileFault ? "lost" : "refused", detail })
    return
  }
  // A search may find that the graph needs work.
  makeReady(seat)
  if (request === atDesk) {
    atDesk = 0
    if (desk!.answer(hits, flags, dimensions)) return
  }
  const { ids, scores, metadata, vectors } = hits
  if (hitHead.length === 0) waitingSince = performance.now()
  hitHead.push(request, ids.length, flags, dimensions)
  for (const id of ids) hitIds.push(id)
  hitScores.push(scores)
  hitResults += ids.length
  if (metadata !== undefined) for (const text of metadata) hitMetadata.push(text)
  if (vectors !== undefined) {
    hitVectors.push(vectors)
    hitComponents += vectors.length
  }
}

const read = (command: Command & { readonly kind: "get" | "stats" }): void => {
  const { request } = command
  const seat = seats.get(command.partition)
  if (seat === undefined) {
    answer({ kind: "failed", request, reason: "lost", detail: "the partition is closed" })
    return
  }
  Atomics.store(shared, atWork, seat.number)
  try {
    if (command.kind === "stats") answer({ kind: "stats", request, stats: seat.partition.stats })
    else answer(seat.partition.read(request, command.ids))
  } catch (error) {
    // What cannot be read of a snapshot's files is not served by guess.
    lose(seat, messageOf(error))
    answer({ kind: "failed", request, reason: "lost", detail: messageOf(error) })
  }
}

/** Answers all that arrives while there is no work; beside work, what is overdue or within its share. */
const runSearches = (): void => {
  while (searches.size > 0 || reads.length > 0) {
    for (const command of reads.splice(0)) read(command)
    let last = performance.now()
    let left = searches.size
    for (const [request, one] of searches) {
      if (left-- === 0) break
      const isBesideWork = ready.length > 0
      if (isBesideWork && owedMillis >= insertSliceMillis && last - one.arrivedAt < overdueMillis) return
      searches.delete(request)
      if (one.seat.closed) continue
      if (one.filter !== undefined && !one.seat.partition.filtersReady()) {
        one.seat.parked.set(request, one)
        makeReady(one.seat)
        continue
      }
      search(one)
      if (Atomics.load(shared, mustStop) !== 0) return
      const now = performance.now()
      if (isBesideWork) owedMillis += (now - last) * workPerSearch
      last = now
      if (areAnswersDue(now)) flush()
    }
    if (ready.length > 0) return
    receive()
  }
}

const areAnswersDue = (now: number): boolean => {
  const held = hitHead.length / hitWords
  if (held === 0) return false
  const millis = now - waitingSince
  if (held >= answersMax || millis > answerDelayMillisMax) return true
  return millis > answerDelayMillis && held * waitingPerAnswer > searches.size
}

// --- The lane of work --------------------------------------------------------------------------------------------------

const hasStep = (seat: Seat): boolean =>
  !seat.closed && !seat.waiting && (seat.jobs.length > 0 || seat.partition.hasBackgroundWork)

const makeReady = (seat: Seat): void => {
  if (seat !== running && hasStep(seat) && !ready.includes(seat)) ready.push(seat)
}

/** Works for one partition until the slice is over. */
const runSlice = (): void => {
  const began = performance.now()
  const seat = nextSeat()
  running = seat
  Atomics.store(shared, atWork, seat.number)
  while (hasStep(seat)) {
    if (seat.jobs.length > 0) jobStep(seat)
    else if (!backgroundStep(seat)) break
    const millis = performance.now() - began
    if (millis >= insertSliceMillis || Atomics.load(shared, mustStop) !== 0) break
    receive()
    if ((searches.size > 0 || reads.length > 0) && millis >= owedMillis) break
  }
  running = undefined
  owedMillis = Math.max(0, owedMillis - (performance.now() - began))
  makeReady(seat)
  if (seat.parked.size > 0 && seat.partition.filtersReady()) {
    for (const [request, one] of seat.parked) searches.set(request, one)
    seat.parked.clear()
  }
}

/** False where the partition is lost by it. */
const backgroundStep = (seat: Seat): boolean => {
  try {
    seat.partition.backgroundStep()
    tellMatches(seat)
    return true
  } catch (error) {
    lose(seat, messageOf(error))
    return false
  }
}

/** The seat whose turn it is: those with jobs, or with a search that waits for them, before those without, mostly. */
const nextSeat = (): Seat => {
  const isAsked = (seat: Seat) => seat.jobs.length > 0 || seat.parked.size > 0
  slices += 1
  const at = ready.findIndex(slices % backgroundEverySlices === 0 ? (seat) => !isAsked(seat) : isAsked)
  return ready.splice(Math.max(at, 0), 1)[0]!
}

const jobStep = (seat: Seat, resumed?: { readonly value?: unknown; readonly error?: unknown }): void => {
  const job = seat.jobs[0]!
  try {
    const step =
      resumed === undefined
        ? job.work.next()
        : "error" in resumed
          ? job.work.throw(resumed.error)
          : job.work.next(resumed.value)
    if (step.done === true) {
      seat.jobs.shift()
      closedBytes += seat.partition.takeLeftBytes()
      answer(step.value)
    } else if (step.value !== undefined) {
      seat.waiting = true
      step.value.then(
        (value) => resume(seat, { value }),
        (error: unknown) => resume(seat, { error })
      )
    }
  } catch (error) {
    seat.jobs.shift()
    lose(seat, `while working: ${messageOf(error)}`)
    answer({ kind: "failed", request: job.request, reason: "lost", detail: messageOf(error) })
  }
}

const resume = (seat: Seat, settledWith: { readonly value?: unknown; readonly error?: unknown }): void => {
  seat.waiting = false
  if (!enter()) return
  Atomics.store(shared, atWork, seat.number)
  if (seat.closed) {
    leaving.delete(seat)
    vacate(seat)
    if (isStopping) end()
  } else {
    jobStep(seat, settledWith)
    makeReady(seat)
    schedule()
  }
  leave()
}

/** A partition whose state cannot be trusted: everything asked of it fails, until it is opened again. */
const lose = (seat: Seat, detail: string): void => {
  for (const { request } of seat.jobs.splice(0)) answer({ kind: "failed", request, reason: "lost", detail })
  for (const request of seat.parked.keys()) answer({ kind: "failed", request, reason: "lost", detail })
  for (const one of searches.values()) {
    if (one.seat === seat) answer({ kind: "failed", request: one.request, reason: "lost", detail })
  }
  if (seat.partition.standing !== undefined) answer({ kind: "gone", request: 0, partition: seat.number, detail })
  close(seat)
}

const close = (seat: Seat): void => {
  seat.closed = true
  bytesDue = true
  seats.delete(seat.number)
  seat.parked.clear()
  const at = ready.indexOf(seat)
  if (at !== -1) ready.splice(at, 1)
  // What is under way in another thread of the process still needs the partition's memory.
  if (seat.waiting) leaving.add(seat)
  else vacate(seat)
}

/** What was let go of since garbage was last collected here. */
let closedBytes = 0
let collectedAt = 0
/** Whether memory is said to be short. */
let isShort = false
/** So much is worth it then. */
const collectBytesWhereShort = 4 * 1_048_576

/** V8 does not see that WebAssembly's memories of what was let go of are of no use any more. */
const collectWhereDue = (): void => {
  if (closedBytes < collectBytes && !isShort) return
  if (ready.length > 0 && performance.now() - collectedAt < collectEveryMillis) return
  flush()
  if (closedBytes >= (isShort ? collectBytesWhereShort : collectBytes)) {
    closedBytes = 0
    collectGarbage()
  } else collectGrown()
  isShort = false
  collectedAt = performance.now()
}

const vacate = (seat: Seat): void => {
  closedBytes += seat.partition.bytes
  for (const { work } of seat.jobs.splice(0)) work.return(undefined as never)
  seat.partition.dispose()
}

function* openJob(request: number, partition: Resident, files: OpenFiles | undefined): Work<Answer> {
  try {
    if (files !== undefined) yield* partition.open(files)
    return { kind: "opened", request, form: partition.form }
  } catch (error) {
    return { kind: "failed", request, reason: "unreadable", detail: messageOf(error) }
  }
}

function* applyJob(request: number, seat: Seat, segment: Uint8Array): Work<Answer> {
  const { partition } = seat
  // Writes that never cease must not keep standing queries from being searched anew; nor these keep writes waiting.
  for (let i = 0; i < searchesPerSegment && partition.standing?.hasWork === true; i++) {
    partition.standing.workStep()
    yield
  }
  // A segment that cannot be applied throws: without it, the partition is not what its log says.
  const effects = yield* partition.apply(segment)
  tellMatches(seat)
  return { kind: "applied", request, effects }
}

function* watchJob(partition: Resident, command: WatchCommand): Work<Answer> {
  const { request, watch, vector } = command
  if (vector.length !== partition.spec.dimensions) {
    return { kind: "failed", request, reason: "refused", detail: `a standing query of ${vector.length} components` }
  }
  yield* partition.watch(command)
  return { kind: "watched", request, watch, matches: partition.standing?.take() }
}

// biome-ignore lint/correctness/useYield: a job that is done in one step.
function* unwatchJob(request: number, partition: Resident, watch: number): Work<Answer> {
  partition.standing?.remove(watch)
  return { kind: "unwatched", request }
}

/** Sends what has changed of the answers to a partition's standing queries. */
const tellMatches = ({ number, partition }: Seat): void => {
  const matches = partition.standing?.take()
  if (matches !== undefined) answer({ kind: "matched", request: 0, partition: number, matches })
}

function* snapshotJob(request: number, partition: Resident, directory: string): Work<Answer> {
  try {
    const files = yield* partition.snapshot(directory)
    return { kind: "written", request, files, form: partition.form }
  } catch (error) {
    return { kind: "failed", request, reason: "unreadable", detail: messageOf(error) }
  }
}

// --- Messages ----------------------------------------------------------------------------------------------------------

/** Takes in all messages that have arrived, without a turn of the event loop. */
const receive = (): void => {
  for (let one = receiveMessageOnPort(port); one !== undefined; one = receiveMessageOnPort(port)) {
    take(one.message as ToThread)
  }
  takeFromDesk()
}

const takeFromDesk = (): void => {
  if (desk === undefined || atDesk !== 0) return
  const query = desk.peek()
  if (query === undefined) return
  const { request, k, ef, flags, filter, vector } = query
  const arrivedAt = performance.now()
  atDesk = request
  deskUsedAt = arrivedAt
  const seat = seats.get(query.partition)
  if (seat === undefined) answer({ kind: "failed", request, reason: "lost", detail: "the partition is closed" })
  else searches.set(request, { request, arrivedAt, seat, k, ef, flags, filter, vector })
}

/** What lay at the desk and is not waited for here any more has been answered by a message, or needs none. */
const clearDesk = (): void => {
  if (atDesk === 0 || searches.has(atDesk)) return
  for (const { parked } of seats.values()) if (parked.has(atDesk)) return
  atDesk = 0
  desk!.giveBack()
}

/** Whether nothing can come but what is said at the desk's bell, soon after a search that lay there. */
const mayLinger = (): boolean => {
  if (scheduled || isStopping || leaving.size > 0) return false
  for (const seat of seats.values()) if (seat.waiting) return false
  return performance.now() - deskUsedAt < lingerMillis
}

const take = (message: ToThread): void => {
  if (message.searches !== undefined) {
    const { head, filters, vectors } = message.searches
    const arrivedAt = performance.now()
    let at = 0
    for (let i = 0; i < head.length; i += searchWords) {
      const request = head[i]!
      const seat = seats.get(head[i + 1]!)
      const vector = vectors.subarray(at, at + head[i + 6]!)
      at += head[i + 6]!
      if (seat === undefined) {
        answer({ kind: "failed", request, reason: "lost", detail: "the partition is closed" })
        continue
      }
      const filter = filters[head[i + 5]!]
      searches.set(request, {
        request,
        arrivedAt,
        seat,
        k: head[i + 2]!,
        ef: head[i + 3]!,
        flags: head[i + 4]!,
        filter,
        vector
      })
    }
  }
  if (message.commands !== undefined) for (const command of message.commands) obey(command)
  if (message.cancelled !== undefined) {
    for (const request of message.cancelled) {
      if (searches.delete(request)) continue
      for (const seat of seats.values()) seat.parked.delete(request)
    }
  }
  if (message.collect === true) isShort = true
  if (message.stop === true) {
    isStopping = true
    for (const seat of [...seats.values()]) close(seat)
    end()
  }
}

const obey = (command: Command): void => {
  if (command.kind === "open") {
    const partition = new Resident(command.spec, { graphFrom, cache, sketchFrom })
    const seat: Seat = {
      number: command.partition,
      partition,
      jobs: [],
      waiting: false,
      closed: false,
      parked: new Map()
    }
    seats.set(seat.number, seat)
    seat.jobs.push({ request: command.request, work: openJob(command.request, partition, command.snapshot) })
    makeReady(seat)
    return
  }
  if (command.kind === "get" || command.kind === "stats") {
    reads.push(command)
    return
  }
  const seat = seats.get(command.partition)
  if (command.kind === "close") {
    if (seat !== undefined) close(seat)
    return
  }
  const { request } = command
  if (seat === undefined) {
    answer({ kind: "failed", request, reason: "lost", detail: "the partition is closed" })
    return
  }
  seat.jobs.push({ request, work: workOf(command, seat) })
  makeReady(seat)
}

const workOf = (
  command: Command & { readonly kind: "apply" | "snapshot" | "watch" | "unwatch" },
  seat: Seat
): Work<Answer> => {
  const { request } = command
  const { partition } = seat
  switch (command.kind) {
    case "apply":
      return applyJob(request, seat, command.segment)
    case "snapshot":
      return snapshotJob(request, partition, command.directory)
    case "watch":
      return watchJob(partition, command)
    case "unwatch":
      return unwatchJob(request, partition, command.watch)
  }
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error))

/** Says that native code may be running from here on; false where it must not any more. */
const enter = (): boolean => {
  Atomics.store(shared, isBusy, 1)
  if (Atomics.load(shared, mustStop) === 0) return true
  leave()
  return false
}

const leave = (): void => {
  Atomics.store(shared, atWork, 0)
  Atomics.store(shared, isBusy, 0)
  Atomics.notify(shared, isBusy)
}

/** Ends the thread from inside, where it is not in native code. */
const end = (): void => {
  if (leaving.size > 0) return
  leave()
  process.exit(0)
}

const turn = (): void => {
  if (desk === undefined) return void work()
  let rung: number
  do {
    rung = desk.rung
    if (!work()) return
  } while ((mayLinger() && desk.linger(rung, lingerMillis)) || !desk.leave(rung))
}

/** False where there must be no more. */
const work = (): boolean => {
  scheduled = false
  if (!enter()) return false
  receive()
  runSearches()
  if (ready.length > 0) {
    // Most of what overdue searches took is forgiven: work catches up with what it can.
    owedMillis = Math.min(owedMillis, 2 * insertSliceMillis)
    flush()
    runSlice()
    schedule()
  } else owedMillis = 0
  collectWhereDue()
  flush()
  clearDesk()
  if (desk !== undefined) desk.isEngaged = ready.length > 0
  leave()
  return true
}

/** The event loop turns between two slices, so that files and promises get on. */
const schedule = (): void => {
  if (scheduled) return
  scheduled = true
  setImmediate(turn)
}

/** Compiled before they are first needed, once the thread has had time to do what it was started for. */
const compileKernels = (): void => {
  const memory = memoryOf(0)
  rowKernelOf(memory)
  sketchKernelOf(memory)
  checkKernelOf(memory)
}
setTimeout(compileKernels, compileAfterMillis).unref()

port.on("message", (message: ToThread) => {
  if (!enter()) return
  take(message)
  if (scheduled) leave()
  else turn()
})
