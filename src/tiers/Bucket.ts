/**
 * A bucket as the settings have it: of a node's data, and of backups. What speaks to one is loaded where one is opened: it
 * brings Node's HTTP along.
 */
import { Effect, Layer } from "effect"
import type { SettingValues } from "../config.ts"
import type { BucketUnusable } from "./GcsObjectStore.ts"
import type { ObjectStore } from "./ObjectStore.ts"

export type BucketSettings = Pick<
  SettingValues,
  | "storeConnectionsMax"
  | "storeRequestMillis"
  | "storeAttemptsMax"
  | "storeRetryMillis"
  | "storeResumableBytes"
  | "storeDownloadBytes"
>

/** `scratch`: a directory that is there, for downloads while they are used. */
export const layer = (
  url: string,
  scratch: string,
  settings: BucketSettings
): Layer.Layer<ObjectStore, BucketUnusable> =>
  Layer.unwrap(
    Effect.map(
      Effect.promise(() => import("./GcsObjectStore.ts")),
      (GcsObjectStore) =>
        GcsObjectStore.layer({
          url,
          scratch,
          connectionsMax: settings.storeConnectionsMax,
          requestMillis: settings.storeRequestMillis,
          attemptsMax: settings.storeAttemptsMax,
          retryMillis: settings.storeRetryMillis,
          resumableBytes: settings.storeResumableBytes,
          downloadBytes: settings.storeDownloadBytes
        })
    )
  )

/** Whether a data setting names a bucket. */
export const isBucketUrl = (text: string): boolean => text.startsWith("gs://")

/**
 * The parts of `gs://bucket/prefix`: the prefix is empty, or ends with a slash. `undefined` where the text is no such
 * address: bucket names are 3-222 of `a-z 0-9 - _ .`, prefixes are segments of `A-Za-z0-9_.-`.
 */
export const bucketOf = (url: string): { readonly bucket: string; readonly prefix: string } | undefined => {
  const [, bucket, path = ""] = /^gs:\/\/([a-z0-9][a-z0-9_.-]{1,220}[a-z0-9])(?:\/(.*))?$/.exec(url) ?? []
  const prefix = path.replace(/\/$/, "")
  if (bucket === undefined || prefix.length > prefixCharsMax) return undefined
  if (prefix === "") return { bucket, prefix }
  const fits = prefix.split("/").every((segment) => /^[A-Za-z0-9_.-]+$/.test(segment) && !/^\.\.?$/.test(segment))
  return fits ? { bucket, prefix: `${prefix}/` } : undefined
}

/** Characters of a prefix: with the longest key the name stays below the store's 1,024. */
const prefixCharsMax = 400
