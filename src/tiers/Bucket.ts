/** A bucket as the settings have it: of a node's data, and of backups. */
import type { Layer } from "effect"
import type { SettingValues } from "../config.ts"
import * as GcsObjectStore from "./GcsObjectStore.ts"
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
): Layer.Layer<ObjectStore, GcsObjectStore.BucketUnusable> =>
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
