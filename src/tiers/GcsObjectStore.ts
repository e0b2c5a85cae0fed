/**
 * An object store in a bucket of Google Cloud Storage. An etag is the object's generation; `create` and `replace` are
 * uploads with `ifGenerationMatch`, so that of many writers one wins, wherever they run.
 *
 * Every write carries a nonce in the object's metadata. A write whose answer was lost is sent again, and may then be
 * refused because it was there already: the nonce tells its own object from another's. Waits between attempts are random
 * from nothing to a bound that doubles ("full jitter", Brooker 2015).
 *
 * Keys are named as in `GcsNames.ts`. What is uploaded and downloaded is checked by CRC-32C, on either side.
 */
import { randomBytes, randomUUID } from "node:crypto"
import { open, readFile, rm, stat, unlink } from "node:fs/promises"
import { join } from "node:path"
import { Data, Effect, Layer } from "effect"
import { bucketOf } from "./Bucket.ts"
import { crc32c, crc32cJoin, crc32cText } from "./Crc32c.ts"
import { GcsNames } from "./GcsNames.ts"
import {
  CredentialsFailed,
  type GcsAnswer,
  type GcsRequest,
  GcsRequests,
  type RequestBody,
  RequestFailed
} from "./GcsRequests.ts"
import {
  checkObjectKey,
  checkObjectPrefix,
  type ListedObject,
  listLimitDefault,
  type ObjectBody,
  ObjectChanged,
  ObjectExists,
  ObjectMissing,
  ObjectStore,
  type StoredObject,
  StoreFailure,
  withFileOf
} from "./ObjectStore.ts"

export interface GcsObjectStoreOptions {
  /** `gs://bucket` or `gs://bucket/prefix`; see {@link bucketOf}. */
  readonly url: string
  /** Where downloads lie while they are used. There already. */
  readonly scratch: string
  /** Instead of Google's, or of `STORAGE_EMULATOR_HOST`: an emulator's address, asked without credentials. */
  readonly endpoint?: string
  /** Requests under way at one time. */
  readonly connectionsMax: number
  /** Time for one request. */
  readonly requestMillis: number
  /** Attempts at one operation, and the time after whose end no further one begins. */
  readonly attemptsMax: number
  readonly retryMillis: number
  /** The wait before the second attempt is random below this; before later ones below twice as much each time. */
  readonly retryBaseMillis?: number
  /** Bodies up to here are sent as one request; larger ones as a resumable upload, in pieces of this size. */
  readonly resumableBytes: number
  /**
   * Whether an upload that was cut goes on where it was; else it begins again. By default with Google's own service:
   * emulators (fake-gcs-server 1.56) take the question what they have for the upload's end.
   */
  readonly resumes?: boolean
  /** Bytes of one request of a download, of which up to {@link downloadsAtOnce} are under way for one object. */
  readonly downloadBytes: number
}

/** The bucket cannot be used. The `message` is one line for people. */
export class BucketUnusable extends Data.TaggedError("BucketUnusable")<{
  readonly url: string
  readonly detail: string
}> {
  override get message(): string {
    return `The bucket of ${this.url} cannot be used: ${this.detail}.`
  }
}

/** A bucket as an {@link ObjectStore}. Fails where the bucket is not there, or may not be read. */
export const layer = (options: GcsObjectStoreOptions): Layer.Layer<ObjectStore, BucketUnusable> =>
  Layer.effect(ObjectStore, make(options))

/** Pieces of one object downloaded at one time. */
export const downloadsAtOnce = 6

/** Pieces of all objects downloaded at one time, each in memory until it is written. */
export const piecesAtOnce = 12

/** Lists of one key prefix that several shards are asked for, at one time. */
const listsAtOnce = 16

/** Objects that the store gives in one answer to a list. */
const listPageMax = 1_000

/** Times a download begins again because the object was replaced under it, or came damaged. */
const downloadsMax = 3

/** Times in a row that an upload is cut without having come further, before it begins again. */
const resumptionsMax = 5

const retryBaseMillisDefault = 50
const retryWaitMillisMax = 5_000

const nonceName = "ruvector-nonce"

const make = Effect.fnUntraced(function* (options: GcsObjectStoreOptions) {
  const address = bucketOf(options.url)
  const unusable = (detail: string) => new BucketUnusable({ url: options.url, detail })
  if (address === undefined) {
    return yield* unusable("it is no address of the form gs://bucket/prefix, prefix of A-Z a-z 0-9 _ . - and slashes")
  }
  // Loaded here, so that a node without a bucket need not.
  const { Storage } = yield* Effect.promise(() => import("@google-cloud/storage"))
  const storage = new Storage(options.endpoint === undefined ? {} : { apiEndpoint: options.endpoint })
  if (!URL.canParse(storage.apiEndpoint)) {
    return yield* unusable(`its service's address is none: ${storage.apiEndpoint} (STORAGE_EMULATOR_HOST)`)
  }
  const requests = yield* Effect.acquireRelease(
    Effect.sync(
      () =>
        new GcsRequests({
          endpoint: storage.apiEndpoint,
          authorize: storage.customEndpoint ? async () => [] : () => storage.authClient.getRequestHeaders(),
          connectionsMax: options.connectionsMax,
          requestMillis: options.requestMillis
        })
    ),
    (made) => Effect.sync(() => made.close())
  )
  const objects = new BucketObjects(options, address, requests, options.resumes ?? !storage.customEndpoint)

  const run = <A, E extends StoreError>(act: (signal: AbortSignal) => Promise<A>): Effect.Effect<A, E> =>
    Effect.callback<A, E>((resume, signal) => {
      act(signal).then(
        (value) => resume(Effect.succeed(value)),
        (cause: unknown) => resume(isStoreError(cause) ? Effect.fail(cause as E) : Effect.die(cause))
      )
    })
  // What may have been written has to be known to whoever asked, as with a file system.
  const write = <A, E extends StoreError>(act: () => Promise<A>): Effect.Effect<A, E> =>
    Effect.uninterruptible(run<A, E>(act))

  yield* Effect.mapError(
    run<void, StoreFailure>((signal) => objects.look(signal)),
    ({ detail }) => unusable(detail)
  )

  const localPath: ObjectStore["Service"]["localPath"] = (key) =>
    Effect.acquireRelease(
      run<string, ObjectMissing | StoreFailure>((signal) => objects.download(key, signal)),
      (path) => Effect.promise(() => rm(path, { force: true })),
      { interruptible: true }
    )

  return ObjectStore.of({
    create: (key, body) => write(() => objects.create(key, body)),
    replace: (key, body, expected) => write(() => objects.replace(key, body, expected)),
    get: (key, range) => run((signal) => objects.get(key, range, signal)),
    list: (prefix, listOptions) =>
      run((signal) =>
        objects.list(prefix, listOptions?.startAfter ?? "", listOptions?.limit ?? listLimitDefault, signal)
      ),
    delete: (key) => write(() => objects.delete(key)),
    localPath,
    withFile: withFileOf(localPath)
  })
})

type StoreError = ObjectExists | ObjectMissing | ObjectChanged | StoreFailure

const isStoreError = (cause: unknown): cause is StoreError =>
  cause instanceof ObjectExists ||
  cause instanceof ObjectMissing ||
  cause instanceof ObjectChanged ||
  cause instanceof StoreFailure

/** One operation of a caller's, over all its attempts. */
class Operation {
  readonly name: string
  readonly key: string
  readonly signal: AbortSignal | undefined
  /** Whether the store may have done what was asked. */
  uncertain = false
  attempts = 0
  readonly beganAt = performance.now()

  constructor(name: string, key: string, signal: AbortSignal | undefined) {
    this.name = name
    this.key = key
    this.signal = signal
  }

  failure(detail: string): StoreFailure {
    const attempts = this.attempts > 1 ? `, after ${this.attempts} attempts` : ""
    return new StoreFailure({
      operation: this.name,
      key: this.key,
      detail: `${detail}${attempts}`,
      uncertain: this.uncertain
    })
  }
}

/** An attempt that failed in a way that another may not. */
class AttemptFailed extends Error {}

interface Current {
  readonly generation: string
  readonly sizeBytes: number
  readonly crc: string
  readonly nonce: string | undefined
}

/** What an upload is made of. */
type Upload =
  | { readonly bytes: Uint8Array; readonly sizeBytes: number; readonly crc: number }
  | { readonly file: string; readonly sizeBytes: number; readonly crc: number }

class BucketObjects {
  readonly #options: GcsObjectStoreOptions
  readonly #bucket: string
  readonly #names: GcsNames
  readonly #requests: GcsRequests
  readonly #resumes: boolean
  readonly #pieces = new Turns(piecesAtOnce)

  constructor(
    options: GcsObjectStoreOptions,
    address: { readonly bucket: string; readonly prefix: string },
    requests: GcsRequests,
    resumes: boolean
  ) {
    this.#options = options
    this.#bucket = address.bucket
    this.#names = new GcsNames(address.prefix)
    this.#requests = requests
    this.#resumes = resumes
  }

  /** Fails where the bucket is not there, or its objects may not be listed. */
  async look(signal: AbortSignal): Promise<void> {
    const operation = new Operation("open", "", signal)
    await this.#retrying(operation, async () => {
      const path = `/storage/v1/b/${this.#bucket}/o?maxResults=1&fields=items(name)`
      const answer = await this.#send(operation, { method: "GET", path })
      if (answer.status === 404) throw operation.failure("it does not exist")
      if (answer.status !== 200) throw this.#refused(operation, answer)
    })
  }

  async create(key: string, body: ObjectBody): Promise<string> {
    checkObjectKey(key)
    const operation = new Operation("create", key, undefined)
    const upload = await uploadOf(operation, body, this.#options.resumableBytes)
    const nonce = `create-${randomBytes(12).toString("hex")}`
    const generation = await this.#retrying(operation, async () => {
      const answer = await this.#upload(operation, key, upload, "0", nonce)
      if (answer.status !== 412) return this.#uploaded(operation, answer, upload)
      const there = await this.#current(operation, key)
      if (there?.nonce === nonce) return there.generation
      // Made by another's `create`, for which the name was free: ours is not beneath it.
      if (there?.nonce?.startsWith("create-") === true || (there !== undefined && !operation.uncertain)) {
        throw new ObjectExists({ key })
      }
      if (there !== undefined) throw operation.failure("another object is there, perhaps made from this one")
      if (operation.uncertain) throw operation.failure("the object was there and is deleted, perhaps this one")
      throw new AttemptFailed("others created and deleted the object")
    })
    if (!(body instanceof Uint8Array)) await rm(body.file, { force: true }).catch(() => undefined)
    return generation
  }

  async replace(key: string, body: Uint8Array, expected: string): Promise<string> {
    checkObjectKey(key)
    const operation = new Operation("replace", key, undefined)
    const upload: Upload = { bytes: body, sizeBytes: body.length, crc: crc32c(body) }
    const nonce = `replace-${randomBytes(12).toString("hex")}`
    const known = generationPattern.test(expected)
    return await this.#retrying(operation, async () => {
      if (known) {
        const answer = await this.#upload(operation, key, upload, expected, nonce)
        if (answer.status !== 412) return this.#uploaded(operation, answer, upload)
      }
      const there = await this.#current(operation, key)
      if (there?.nonce === nonce) return there.generation
      if (operation.uncertain) {
        throw operation.failure(
          `${there === undefined ? "none" : "another object"} is there by now, perhaps after this`
        )
      }
      if (there === undefined) throw new ObjectMissing({ key })
      throw new ObjectChanged({ key })
    })
  }

  async get(
    key: string,
    range: { readonly offset: number; readonly length: number } | undefined,
    signal: AbortSignal
  ): Promise<StoredObject> {
    checkObjectKey(key)
    const operation = new Operation("get", key, signal)
    return await this.#retrying(operation, async () => {
      if (range === undefined || range.length > 0) {
        const part = await this.#read(operation, key, range, undefined)
        if (part !== undefined) return { body: part.body, etag: part.generation, sizeBytes: part.sizeBytes }
      }
      // Nothing of the object was asked for.
      const there = await this.#current(operation, key)
      if (there === undefined) throw new ObjectMissing({ key })
      return { body: new Uint8Array(0), etag: there.generation, sizeBytes: there.sizeBytes }
    })
  }

  async list(prefix: string, startAfter: string, limit: number, signal: AbortSignal): Promise<Array<ListedObject>> {
    checkObjectPrefix(prefix)
    const operation = new Operation("list", prefix, signal)
    const shards = this.#names.shardsOf(prefix)
    const found: Array<ListedObject> = []
    await inParallel(shards, listsAtOnce, async (shard) => {
      found.push(...(await this.#listShard(operation, shard, prefix, startAfter, limit)))
    })
    if (shards.length > 1) found.sort((a, b) => (a.key < b.key ? -1 : 1))
    return found.slice(0, limit)
  }

  async delete(key: string): Promise<void> {
    checkObjectKey(key)
    const operation = new Operation("delete", key, undefined)
    await this.#retrying(operation, async () => {
      const answer = await this.#send(operation, { method: "DELETE", path: this.#objectPath(key) }, true)
      if (answer.status !== 404 && Math.floor(answer.status / 100) !== 2) throw this.#refused(operation, answer)
    })
  }

  /** Puts an object's bytes into a new file of the scratch folder, in parallel pieces of one generation. */
  async download(key: string, signal: AbortSignal): Promise<string> {
    checkObjectKey(key)
    const path = join(this.#options.scratch, `object-${randomUUID()}`)
    const operation = new Operation("localPath", key, signal)
    try {
      for (let attempt = 1; ; attempt++) {
        const fault = await this.#downloadOnce(operation, key, path)
        if (signal.aborted) throw operation.failure("interrupted")
        if (fault === undefined) return path
        if (attempt === downloadsMax) throw operation.failure(fault)
      }
    } catch (cause) {
      await unlink(path).catch(() => undefined)
      const code = (cause as NodeJS.ErrnoException).code
      throw code === undefined ? cause : operation.failure(`${(cause as Error).message} (${code})`)
    }
  }

  /** What is wrong with what came; `undefined` where the file is whole. */
  async #downloadOnce(operation: Operation, key: string, path: string): Promise<string | undefined> {
    const step = this.#options.downloadBytes
    const file = await open(path, "w", 0o600)
    // What it was part of, once it is in the file; in memory it is only so long.
    const piece = (offset: number, generationThere: string | undefined) =>
      this.#pieces.run(async () => {
        const part = new Operation(operation.name, key, operation.signal)
        const read = await this.#retrying(part, () => this.#read(part, key, { offset, length: step }, generationThere))
        if (read === undefined) return undefined
        await writeAll(file, read.body, offset)
        const { bodyCrc, generation, crc, sizeBytes } = read
        return { bodyCrc, generation, crc, sizeBytes }
      })
    try {
      const first = await piece(0, undefined)
      if (first === undefined) return undefined
      const { generation, sizeBytes } = first
      const offsets: Array<number> = []
      for (let offset = step; offset < sizeBytes; offset += step) offsets.push(offset)
      const sums = new Map([[0, first.bodyCrc]])
      try {
        await inParallel(offsets, downloadsAtOnce, async (offset) => {
          const part = await piece(offset, generation)
          if (part === undefined || part.sizeBytes !== sizeBytes) throw operation.failure("its size changed")
          sums.set(offset, part.bodyCrc)
        })
      } catch (cause) {
        // That generation is gone: the next attempt sees what is there now.
        if (cause instanceof ObjectMissing) return "others replaced the object again and again"
        throw cause
      }
      let crc = sums.get(0) as number
      for (const offset of offsets) {
        crc = crc32cJoin(crc, sums.get(offset) as number, Math.min(step, sizeBytes - offset))
      }
      const expected = first.crc ?? (await this.#checksumOf(operation, key, generation))
      if (expected === undefined) return "others replaced the object again and again"
      return crc32cText(crc) === expected ? undefined : "what came differs from the object's checksum"
    } finally {
      await file.close()
    }
  }

  /** What the store holds to be the CRC-32C of a generation; `undefined` where that is gone. */
  async #checksumOf(operation: Operation, key: string, generation: string): Promise<string | undefined> {
    const part = new Operation(operation.name, key, operation.signal)
    const there = await this.#retrying(part, () => this.#current(part, key))
    return there?.generation === generation ? there.crc : undefined
  }

  /**
   * An object or a range of it, which holds at least a byte: `undefined` where the range is beyond the object's end. Of
   * one generation, where that is given.
   */
  async #read(
    operation: Operation,
    key: string,
    range: { readonly offset: number; readonly length: number } | undefined,
    generation: string | undefined
  ) {
    const query = generation === undefined ? "?alt=media" : `?alt=media&generation=${generation}`
    const headers = range === undefined ? {} : { range: `bytes=${range.offset}-${range.offset + range.length - 1}` }
    const answer = await this.#send(operation, { method: "GET", path: `${this.#objectPath(key)}${query}`, headers })
    if (answer.status === 416 && range !== undefined) return undefined
    if (answer.status === 404) throw this.#absent(operation, answer)
    if (answer.status !== 200 && answer.status !== 206) throw this.#refused(operation, answer)
    const generationThere = answer.headers["x-goog-generation"]
    const crc = /crc32c=([A-Za-z0-9+/]+=*)/.exec(String(answer.headers["x-goog-hash"] ?? ""))?.[1]
    // Of a part of an object the store need not give the whole one's checksum.
    if (typeof generationThere !== "string" || (crc === undefined && answer.status === 200)) {
      throw operation.failure("the store's answer has no generation or no checksum")
    }
    const sizeBytes =
      answer.status === 206 ? Number(/\/(\d+)$/.exec(answer.headers["content-range"] ?? "")?.[1]) : answer.body.length
    if (answer.status === 200 && crc32cText(answer.crc) !== crc) {
      throw new AttemptFailed("what came differs from the object's checksum")
    }
    let { body, crc: bodyCrc } = answer
    if (range !== undefined && answer.status === 200) {
      // The store may give the whole object instead.
      body = ownMemory(body.subarray(range.offset, range.offset + range.length))
      bodyCrc = crc32c(body)
    }
    const expected = range === undefined ? sizeBytes : Math.max(0, Math.min(range.length, sizeBytes - range.offset))
    if (body.length !== expected) throw new AttemptFailed(`${body.length} bytes came of ${expected}`)
    return { body, bodyCrc, generation: generationThere, crc, sizeBytes }
  }

  async #listShard(operation: Operation, shard: string, prefix: string, startAfter: string, limit: number) {
    const found: Array<ListedObject> = []
    const query = new URLSearchParams({
      prefix: this.#names.nameIn(shard, prefix),
      fields: "items(name,size),nextPageToken"
    })
    // The offset is in the answer where it is an object, so one more is asked for.
    if (startAfter !== "") query.set("startOffset", this.#names.nameIn(shard, startAfter))
    while (found.length < limit) {
      query.set("maxResults", String(Math.min(listPageMax, limit - found.length + 1)))
      const part = new Operation(operation.name, operation.key, operation.signal)
      const page = await this.#retrying(part, async () => {
        const answer = await this.#send(part, { method: "GET", path: `/storage/v1/b/${this.#bucket}/o?${query}` })
        if (answer.status !== 200) throw this.#refused(part, answer)
        return jsonOf(part, answer) as {
          readonly items?: ReadonlyArray<{ readonly name: string; readonly size: string }>
          readonly nextPageToken?: string
        }
      })
      for (const { name, size } of page.items ?? []) {
        const key = this.#names.keyIn(shard, name)
        if (key > startAfter && found.length < limit) found.push({ key, sizeBytes: Number(size) })
      }
      if (page.nextPageToken === undefined || page.nextPageToken === "") break
      query.set("pageToken", page.nextPageToken)
    }
    return found
  }

  /** What is there now; `undefined` where nothing is. */
  async #current(operation: Operation, key: string): Promise<Current | undefined> {
    const path = `${this.#objectPath(key)}?fields=generation,size,crc32c,metadata`
    const answer = await this.#send(operation, { method: "GET", path })
    if (answer.status === 404) {
      const absent = this.#absent(operation, answer)
      if (absent instanceof ObjectMissing) return undefined
      throw absent
    }
    if (answer.status !== 200) throw this.#refused(operation, answer)
    const found = jsonOf(operation, answer) as {
      readonly generation: string
      readonly size: string
      readonly crc32c: string
      readonly metadata?: Readonly<Record<string, string>>
    }
    return {
      generation: found.generation,
      sizeBytes: Number(found.size),
      crc: found.crc32c,
      nonce: found.metadata?.[nonceName]
    }
  }

  async #upload(
    operation: Operation,
    key: string,
    upload: Upload,
    ifGenerationMatch: string,
    nonce: string
  ): Promise<GcsAnswer> {
    const metadata = Buffer.from(
      JSON.stringify({
        contentType: "application/octet-stream",
        crc32c: crc32cText(upload.crc),
        metadata: { [nonceName]: nonce }
      })
    )
    const query = new URLSearchParams({
      uploadType: "bytes" in upload && upload.sizeBytes <= this.#options.resumableBytes ? "multipart" : "resumable",
      ifGenerationMatch,
      name: this.#names.nameOf(key),
      fields: "generation,crc32c"
    })
    const path = `/upload/storage/v1/b/${this.#bucket}/o?${query}`
    if (query.get("uploadType") === "resumable") return await this.#resumable(operation, path, metadata, upload)
    // Random, so that it is not in the body.
    const boundary = randomBytes(16).toString("hex")
    const head = `--${boundary}\r\ncontent-type: application/json\r\n\r\n${metadata}\r\n--${boundary}\r\ncontent-type: application/octet-stream\r\n\r\n`
    const body = [Buffer.from(head), (upload as { bytes: Uint8Array }).bytes, Buffer.from(`\r\n--${boundary}--`)]
    const headers = { "content-type": `multipart/related; boundary=${boundary}` }
    return await this.#send(operation, { method: "POST", path, headers, body }, true)
  }

  /**
   * Sends a body in pieces. Where the answer to one is lost, the store is asked what it has, and the upload goes on from
   * there. The object is there, and the condition looked at, with the last piece.
   */
  async #resumable(operation: Operation, path: string, metadata: Buffer, upload: Upload): Promise<GcsAnswer> {
    const headers = {
      "content-type": "application/json",
      "x-upload-content-type": "application/octet-stream",
      "x-upload-content-length": String(upload.sizeBytes)
    }
    const session = await this.#send(operation, { method: "POST", path, headers, body: [metadata] })
    const location = session.headers.location
    if (session.status !== 200 || location === undefined) return session
    const total = upload.sizeBytes
    let sentBytes = 0
    let resumed = 0
    for (;;) {
      const offset = sentBytes
      const length = Math.min(pieceBytes(this.#options.resumableBytes), total - offset)
      const body =
        "bytes" in upload ? [upload.bytes.subarray(offset, offset + length)] : { file: upload.file, offset, length }
      // With the last piece the object may be there.
      const last = offset + length === total
      const put = async (range: string, sent: RequestBody): Promise<GcsAnswer> => {
        const request = { method: "PUT", path: location, headers: { "content-range": range }, body: sent } as const
        return await this.#send(operation, request, last)
      }
      let answer: GcsAnswer
      try {
        answer = await put(`bytes ${offset}-${offset + length - 1}/${total}`, body)
      } catch (cause) {
        if (!(cause instanceof AttemptFailed) || !this.#resumes) throw cause
        const question = new Operation(operation.name, operation.key, operation.signal)
        resumed += 1
        if (resumed > resumptionsMax) throw cause
        answer = await this.#retrying(question, () => put(`bytes */${total}`, [])).catch(() => {
          throw cause
        })
      }
      if (answer.status !== 308) {
        // A session that is gone: the object was made and its answer lost, or the upload begins again.
        if (answer.status === 404 || answer.status === 410) throw new AttemptFailed("the upload's session is gone")
        return answer
      }
      const received = /^bytes=0-(\d+)$/.exec(answer.headers.range ?? "")?.[1]
      sentBytes = received === undefined ? 0 : Number(received) + 1
      if (sentBytes >= total) throw new AttemptFailed("the store has all of it and made no object")
      if (sentBytes > offset) resumed = 0
    }
  }

  #uploaded(operation: Operation, answer: GcsAnswer, upload: Upload): string {
    if (answer.status !== 200 && answer.status !== 201) throw this.#refused(operation, answer)
    const { generation, crc32c: stored } = jsonOf(operation, answer) as { generation: string; crc32c: string }
    if (stored === crc32cText(upload.crc)) return generation
    operation.uncertain = true
    throw operation.failure("what was stored differs from what was sent")
  }

  #objectPath(key: string): string {
    return `/storage/v1/b/${this.#bucket}/o/${encodeURIComponent(this.#names.nameOf(key))}`
  }

  /** One request. `writes` says that it changes something where it arrives. */
  async #send(operation: Operation, request: GcsRequest, writes = false): Promise<GcsAnswer> {
    let answer: GcsAnswer
    try {
      answer = await this.#requests.send({ ...request, signal: operation.signal })
    } catch (cause) {
      if (!(cause instanceof RequestFailed)) throw cause
      if (writes && cause.sent) operation.uncertain = true
      // Later it may be a service that is down for a moment; at the start it is told at once.
      if (cause instanceof CredentialsFailed && operation.name === "open") throw operation.failure(cause.message)
      throw new AttemptFailed(cause.message)
    }
    if (answer.status === 408 || answer.status >= 500) {
      if (writes) operation.uncertain = true
      throw new AttemptFailed(statusText(answer))
    }
    // 401: a token that has just run out.
    if (answer.status === 429 || (answer.status === 401 && operation.attempts === 1)) {
      throw new AttemptFailed(statusText(answer))
    }
    return answer
  }

  /** Attempts until one succeeds, with waits between them; what else is thrown than {@link AttemptFailed} ends them. */
  async #retrying<A>(operation: Operation, attempt: () => Promise<A>): Promise<A> {
    const { attemptsMax, retryMillis, retryBaseMillis = retryBaseMillisDefault } = this.#options
    for (;;) {
      operation.attempts += 1
      try {
        return await attempt()
      } catch (cause) {
        if (!(cause instanceof AttemptFailed)) throw cause
        const wait = Math.random() * Math.min(retryWaitMillisMax, retryBaseMillis * 2 ** (operation.attempts - 1))
        const late = performance.now() - operation.beganAt + wait > retryMillis
        if (operation.attempts >= attemptsMax || late || operation.signal?.aborted === true) {
          throw operation.failure(cause.message)
        }
        await pause(wait, operation.signal)
      }
    }
  }

  /** 404 says that there is no object, or no bucket. */
  #absent(operation: Operation, answer: GcsAnswer): ObjectMissing | StoreFailure {
    if (/bucket does not exist/i.test(answer.body.toString("utf8", 0, errorBytesRead))) {
      return operation.failure("the bucket does not exist")
    }
    return new ObjectMissing({ key: operation.key })
  }

  #refused(operation: Operation, answer: GcsAnswer): StoreFailure {
    return operation.failure(statusText(answer))
  }
}

const generationPattern = /^[1-9]\d{0,18}$/

/** Bytes of an error's text that are looked at. */
const errorBytesRead = 4_096

const statusText = (answer: GcsAnswer): string => {
  const text = answer.body.toString("utf8", 0, errorBytesRead)
  const message = /"message":\s*"([^"]+)"/.exec(text)?.[1] ?? text.split("\n", 1)[0]?.slice(0, 200) ?? ""
  return `the store answered ${answer.status}${message === "" ? "" : ` (${message})`}`
}

const jsonOf = (operation: Operation, answer: GcsAnswer): unknown => {
  try {
    return JSON.parse(answer.body.toString("utf8"))
  } catch {
    throw operation.failure("the store's answer is no JSON")
  }
}

/** Pieces are multiples of 256 KiB, as the store wants them. */
const pieceBytes = (bound: number): number => Math.max(262_144, Math.floor(bound / 262_144) * 262_144)

/** Bytes of a file that are summed at one time. */
const sumBytes = 1_048_576

/** What is to be sent, and its checksum. A small file is read; a large one stays a file. */
const uploadOf = async (operation: Operation, body: ObjectBody, inMemoryBytesMax: number): Promise<Upload> => {
  if (body instanceof Uint8Array) return { bytes: body, sizeBytes: body.length, crc: crc32c(body) }
  try {
    const { size } = await stat(body.file)
    if (size <= inMemoryBytesMax) {
      const bytes = await readFile(body.file)
      return { bytes, sizeBytes: bytes.length, crc: crc32c(bytes) }
    }
    const file = await open(body.file, "r")
    try {
      const buffer = Buffer.allocUnsafeSlow(sumBytes)
      let crc = 0
      let sizeBytes = 0
      for (;;) {
        const { bytesRead } = await file.read(buffer, 0, buffer.length, sizeBytes)
        if (bytesRead === 0) return { file: body.file, sizeBytes, crc }
        crc = crc32c(buffer.subarray(0, bytesRead), crc)
        sizeBytes += bytesRead
      }
    } finally {
      await file.close()
    }
  } catch (cause) {
    throw operation.failure(String((cause as Error).message))
  }
}

const ownMemory = (bytes: Uint8Array): Buffer => {
  const own = Buffer.allocUnsafeSlow(bytes.length)
  own.set(bytes)
  return own
}

const writeAll = async (file: Awaited<ReturnType<typeof open>>, bytes: Uint8Array, at: number): Promise<void> => {
  for (let done = 0; done < bytes.length; ) {
    done += (await file.write(bytes, done, bytes.length - done, at + done)).bytesWritten
  }
}

/** Runs the work for all items, at most `atOnce` at a time. After a failure none begins, and those under way are awaited. */
const inParallel = async <A>(items: ReadonlyArray<A>, atOnce: number, work: (item: A) => Promise<void>) => {
  let next = 0
  const worker = async () => {
    while (next < items.length) {
      const item = items[next++] as A
      try {
        await work(item)
      } catch (cause) {
        next = items.length
        throw cause
      }
    }
  }
  const ends = await Promise.allSettled(Array.from({ length: Math.min(atOnce, items.length) }, worker))
  for (const end of ends) if (end.status === "rejected") throw end.reason
}

/** Work that waits for its turn, first come first served; at most `atOnce` is under way. */
class Turns {
  #free: number
  readonly #waiting: Array<() => void> = []

  constructor(atOnce: number) {
    this.#free = atOnce
  }

  async run<A>(work: () => Promise<A>): Promise<A> {
    if (this.#free > 0) this.#free -= 1
    else await new Promise<void>((resolve) => this.#waiting.push(resolve))
    try {
      return await work()
    } finally {
      const next = this.#waiting.shift()
      if (next === undefined) this.#free += 1
      else next()
    }
  }
}

const pause = (millis: number, signal: AbortSignal | undefined): Promise<void> =>
  new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer)
      signal?.removeEventListener("abort", done)
      resolve()
    }
    const timer = setTimeout(done, millis)
    signal?.addEventListener("abort", done)
  })
