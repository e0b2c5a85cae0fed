/**
 * Which node of a cell backs it up: one of the runners, another when that one dies. Two may be at it for a moment; a backup is
 * written such that the one that finds it changed beneath it gives up.
 */
import { Effect, Layer } from "effect"
import * as Singleton from "effect/cluster/Singleton"
import { Settings } from "../config.ts"
import { ServerBackup } from "../tiers/ServerBackup.ts"

/** Nothing in a node that is alone, which backs itself up. */
export const layer = Layer.unwrap(
  Effect.map(Settings, ({ databaseUrl, role }) =>
    databaseUrl === "" || role === "gateway"
      ? Layer.empty
      : Singleton.make(
          "backup",
          Effect.flatMap(ServerBackup, ({ duty }) => duty)
        )
  )
)
