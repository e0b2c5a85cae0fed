/** Object stores on a fake-gcs-server that the test file starts once. */
import { afterAll, beforeAll } from "@effect/vitest"
import { Effect, Layer } from "effect"
import * as GcsObjectStore from "../../src/tiers/GcsObjectStore.ts"
import * as SnapshotCache from "../../src/tiers/SnapshotCache.ts"
import { type FakeGcs, startFakeGcs } from "../support/FakeGcs.ts"
import { tempFolder } from "./objectStoreSuite.ts"

export const bucket = "ruvector-test"

/** Small pieces, so that small bodies take all the ways that large ones do; short waits. */
export const gcsOptions = {
  connectionsMax: 32,
  requestMillis: 10_000,
  attemptsMax: 6,
  retryMillis: 20_000,
  retryBaseMillis: 5,
  resumableBytes: 1_048_576,
  downloadBytes: 524_288
}

/** Starts the server before the file's tests and stops it after them; gives how to reach it while they run. */
export const useFakeGcs = (): (() => FakeGcs) => {
  let server: FakeGcs | undefined
  beforeAll(async () => {
    server = await startFakeGcs()
    await server.createBucket(bucket)
  })
  afterAll(() => server?.stop())
  return () => {
    if (server === undefined) throw new Error("fake-gcs-server is not running")
    return server
  }
}

let prefixes = 0

/** A prefix of the bucket that no other test uses. */
export const freshUrl = (): string => {
  prefixes += 1
  return `gs://${bucket}/test-${process.pid}/${prefixes}`
}

/** An empty store for each layer that is built. */
export const gcsLayer = (server: () => FakeGcs, options: Partial<GcsObjectStore.GcsObjectStoreOptions> = {}) =>
  Layer.unwrap(
    Effect.map(tempFolder, (scratch) =>
      GcsObjectStore.layer({ url: freshUrl(), endpoint: server().url, scratch, ...gcsOptions, ...options })
    )
  )

/** The same behind a cache on the local disk. */
export const cachedGcsLayer = (server: () => FakeGcs, bytesMax = 64 * 1_048_576) =>
  Layer.unwrap(
    Effect.map(tempFolder, (directory) =>
      SnapshotCache.layer({ directory, bytesMax }).pipe(Layer.provide(gcsLayer(server)))
    )
  )
