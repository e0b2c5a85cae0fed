/**
 * The cold tier's interface: named immutable objects with conditional create and conditional replace, which is all that
 * the log's fencing rests on. Implementations: {@link ObjectStore.layerMemory} here, a directory in
 * `FileObjectStore.ts`. One suite (`test/tiers/objectStoreSuite.ts`) holds for all of them.
 *
 * Keys are `/`-separated segments of `A-Za-z0-9_.-`, none empty, `.` or `..`, each of at most 200 characters; at most 512
 * characters in all. A key that is none is a defect of the caller's. No object's key is the folder of another's (`a` and
 * `a/b`): where a store cannot hold both, the second fails with {@link StoreFailure}.
 */
import { randomUUID } from "node:crypto"
import { readFile, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Context, Data, Effect, Layer, Scope } from "effect"

export interface StoredObject {
  readonly body: Uint8Array
  readonly etag: string
  /** Bytes of the whole object, also where `body` is a range of it. */
  readonly sizeBytes: number
}

export interface ListedObject {
  readonly key: string
  readonly sizeBytes: number
}

/** Where an object's bytes come from: memory, or a file of this machine (large snapshots), which may be moved away. */
export type ObjectBody = Uint8Array | { readonly file: string }

export interface CreateOptions {
  /**
   * Whoever reads the object tells a whole one from a torn one. Then it may be there in part after a power loss that came
   * before success, which saves a store one of its waits for the disk.
   */
  readonly checked?: boolean
}

/** The object exists already; nothing was written. */
export class ObjectExists extends Data.TaggedError("ObjectExists")<{ readonly key: string }> {}

/** The object is not there. */
export class ObjectMissing extends Data.TaggedError("ObjectMissing")<{ readonly key: string }> {}

/** The object is not the one the caller had read; nothing was written. */
export class ObjectChanged extends Data.TaggedError("ObjectChanged")<{ readonly key: string }> {}

/**
 * The store failed. `uncertain` is true where a write may have taken effect (or may yet), so that the caller must look
 * before it relies on either; false where it certainly did not.
 */
export class StoreFailure extends Data.TaggedError("StoreFailure")<{
  readonly operation: string
  readonly key: string
  readonly detail: string
  readonly uncertain: boolean
}> {
  override get message(): string {
    return `The object store failed (${this.operation} ${this.key}): ${this.detail}${this.uncertain ? ", perhaps after its effect" : ""}.`
  }
}

export class ObjectStore extends Context.Service<
  ObjectStore,
  {
    /** Writes an object that does not exist yet, durably (after success it survives power loss). Returns its etag. */
    readonly create: (
      key: string,
      body: ObjectBody,
      options?: CreateOptions
    ) => Effect.Effect<string, ObjectExists | StoreFailure>
    /** Replaces the object whose etag is `expected`, atomically and durably. Returns the new etag. */
    readonly replace: (
      key: string,
      body: Uint8Array,
      expected: string
    ) => Effect.Effect<string, ObjectChanged | ObjectMissing | StoreFailure>
    /** Reads an object, or `length` bytes of it from `offset` (cut at its end). */
    readonly get: (
      key: string,
      range?: { readonly offset: number; readonly length: number }
    ) => Effect.Effect<StoredObject, ObjectMissing | StoreFailure>
    /**
     * The objects under a prefix (whole segments or parts of one), by key ascending, at most `limit` (default 1,000) after
     * `startAfter`.
     */
    readonly list: (
      prefix: string,
      options?: { readonly startAfter?: string; readonly limit?: number }
    ) => Effect.Effect<ReadonlyArray<ListedObject>, StoreFailure>
    /** Deletes an object; no error where there is none. It may come back after a power loss that follows closely. */
    readonly delete: (key: string) => Effect.Effect<void, StoreFailure>
    /**
     * A path of this machine at which the object's bytes, as they are now, can be read until the scope closes, also if
     * the object is deleted meanwhile. The file must not be written to.
     */
    readonly localPath: (key: string) => Effect.Effect<string, ObjectMissing | StoreFailure, Scope.Scope>
    /** Calls `use` with the {@link localPath} of an object, which stays while it runs. */
    readonly withFile: <A, E, R>(
      key: string,
      use: (path: string) => Effect.Effect<A, E, R>
    ) => Effect.Effect<A, E | ObjectMissing | StoreFailure, R>
  }
>()("ruvector/tiers/ObjectStore") {
  /** Objects in this process's memory, bounded by nothing else: the twin that tests use. */
  static readonly layerMemory: Layer.Layer<ObjectStore> = Layer.sync(ObjectStore, () => makeMemory())
}

/** `withFile` of a store, made of its `localPath`. */
export const withFileOf =
  (localPath: ObjectStore["Service"]["localPath"]): ObjectStore["Service"]["withFile"] =>
  (key, use) =>
    Effect.scopedWith((scope) => Effect.flatMap(Scope.provide(localPath(key), scope), use))

/** Objects that `list` answers with where no limit is given. */
export const listLimitDefault = 1_000

/** Characters of an object's key, and of one segment of it. */
export const keyCharsMax = 512
export const keySegmentCharsMax = 200

const keyPattern = /^[A-Za-z0-9_.-]+(?:\/[A-Za-z0-9_.-]+)*$/
const prefixPattern = /^(?:[A-Za-z0-9_.-]+\/)*[A-Za-z0-9_.-]*$/

const segmentsFit = (segments: ReadonlyArray<string>): boolean =>
  segments.every((segment) => segment !== "." && segment !== ".." && segment.length <= keySegmentCharsMax)

/** Throws a `TypeError` where the text is no key. */
export const checkObjectKey = (key: string): void => {
  if (key.length <= keyCharsMax && keyPattern.test(key) && segmentsFit(key.split("/"))) return
  throw new TypeError(`not an object key: ${JSON.stringify(key.slice(0, keyCharsMax))}`)
}

/** Throws a `TypeError` where the text is no prefix of a key (the empty one is). */
export const checkObjectPrefix = (prefix: string): void => {
  if (prefix.length <= keyCharsMax && prefixPattern.test(prefix) && segmentsFit(prefix.split("/").slice(0, -1))) return
  throw new TypeError(`not a prefix of object keys: ${JSON.stringify(prefix.slice(0, keyCharsMax))}`)
}

const makeMemory = (): ObjectStore["Service"] => {
  const objects = new Map<string, { readonly body: Uint8Array; readonly etag: string }>()
  let etags = 0

  const store = (key: string, body: Uint8Array): string => {
    etags += 1
    const etag = `m${etags}`
    objects.set(key, { body, etag })
    return etag
  }

  // A copy: the caller may go on to write into its buffer.
  const bytesOf = Effect.fnUntraced(function* (operation: string, key: string, body: ObjectBody) {
    if (body instanceof Uint8Array) return new Uint8Array(body)
    return yield* Effect.tryPromise({
      try: async () => {
        const bytes = new Uint8Array(await readFile(body.file))
        await rm(body.file)
        return bytes
      },
      catch: (cause) => new StoreFailure({ operation, key, detail: String(cause), uncertain: false })
    })
  })

  const get = Effect.fnUntraced(function* (key: string, range?: { readonly offset: number; readonly length: number }) {
    checkObjectKey(key)
    const found = objects.get(key)
    if (found === undefined) return yield* new ObjectMissing({ key })
    const body = range === undefined ? found.body.slice() : found.body.slice(range.offset, range.offset + range.length)
    return { body, etag: found.etag, sizeBytes: found.body.length }
  })

  const localPath = (key: string) =>
    Effect.flatMap(get(key), ({ body }) =>
      Effect.acquireRelease(
        Effect.tryPromise({
          try: async () => {
            const path = join(tmpdir(), `ruvector-object-${randomUUID()}`)
            await writeFile(path, body, { flag: "wx", mode: 0o600 })
            return path
          },
          catch: (cause) => new StoreFailure({ operation: "localPath", key, detail: String(cause), uncertain: false })
        }),
        (path) => Effect.promise(() => rm(path, { force: true }))
      )
    )

  return ObjectStore.of({
    create: Effect.fnUntraced(function* (key, body) {
      checkObjectKey(key)
      if (objects.has(key)) return yield* new ObjectExists({ key })
      const bytes = yield* bytesOf("create", key, body)
      if (objects.has(key)) return yield* new ObjectExists({ key })
      return store(key, bytes)
    }),
    replace: Effect.fnUntraced(function* (key, body, expected) {
      checkObjectKey(key)
      const found = objects.get(key)
      if (found === undefined) return yield* new ObjectMissing({ key })
      if (found.etag !== expected) return yield* new ObjectChanged({ key })
      return store(key, new Uint8Array(body))
    }),
    get,
    list: (prefix, options) =>
      Effect.sync(() => {
        checkObjectPrefix(prefix)
        const startAfter = options?.startAfter ?? ""
        return [...objects.keys()]
          .filter((key) => key.startsWith(prefix) && key > startAfter)
          .sort()
          .slice(0, options?.limit ?? listLimitDefault)
          .map((key) => ({ key, sizeBytes: objects.get(key)?.body.length ?? 0 }))
      }),
    delete: (key) =>
      Effect.sync(() => {
        checkObjectKey(key)
        objects.delete(key)
      }),
    localPath,
    withFile: withFileOf(localPath)
  })
}
