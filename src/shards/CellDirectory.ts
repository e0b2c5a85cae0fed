/**
 * Which cell of a region a collection lives in. A cell asks it only for a name that it does not have, and before it makes one:
 * reads and writes of collections that are here need it not. Where the region has one cell there is none.
 *
 * It is a table in Postgres (`directoryUrl`): a name belongs to whichever cell wrote it first.
 */
import { Context, Effect, Layer } from "effect"
import { Settings } from "../config.ts"
import type { StorageUnavailable } from "../protocol/Errors.ts"

/** A cell, and where its gateways are. */
export interface CellPlace {
  readonly cell: string
  readonly url: string
}

export class CellDirectory extends Context.Service<
  CellDirectory,
  {
    /** The cell that has the collection, where it is another than this. */
    readonly find: (name: string) => Effect.Effect<CellPlace | undefined, StorageUnavailable>
    /** Makes the name this cell's, unless it is another's: then that one. */
    readonly claim: (name: string) => Effect.Effect<CellPlace | undefined, StorageUnavailable>
    /** Makes all of them this cell's that are nobody's; answers those that are another's. */
    readonly claimAll: (names: ReadonlyArray<string>) => Effect.Effect<ReadonlyArray<string>, StorageUnavailable>
    /** The collection is deleted. */
    readonly release: (name: string) => Effect.Effect<void, StorageUnavailable>
  }
>()("ruvector/shards/CellDirectory") {
  /** Of a region with one cell. */
  static readonly layerNone = Layer.succeed(
    CellDirectory,
    CellDirectory.of({
      find: () => Effect.undefined,
      claim: () => Effect.undefined,
      claimAll: () => Effect.succeed([]),
      release: () => Effect.void
    })
  )

  /** As the settings say. */
  static readonly layer: Layer.Layer<CellDirectory, Error, Settings> = Layer.unwrap(
    Effect.map(Settings, (settings): Layer.Layer<CellDirectory, Error> => {
      if (settings.directoryUrl === "") return CellDirectory.layerNone
      return Layer.unwrap(
        Effect.map(
          Effect.promise(() => import("./PostgresDirectory.ts")),
          ({ layer }) => layer(settings)
        )
      )
    })
  )
}
