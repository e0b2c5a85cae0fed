/**
 * What a program imports: the client with promises, and in a process of Node the engine too. That is loaded when it is first
 * opened, so that a client of a service waits for nothing that only the engine needs.
 *
 * A program on Effect imports `effect.ts`: the package brings an Effect of its own for what is exported here.
 */
import { Effect } from "effect"
import type { Metadata } from "./client/promiseApi.ts"
import * as Client from "./client/VectorDB.ts"
import type { OpenOptions } from "./embedded/OpenOptions.ts"

export * from "./client/promiseApi.ts"
export { defaultSettings, type SettingName, type SettingValues } from "./config.ts"
export type { OpenOptions } from "./embedded/OpenOptions.ts"

/** The client, on a service or, by `open`, with the engine in this process. */
export class VectorDB<M = Metadata> extends Client.VectorDB<M> {
  /**
   * Opens the engine in this process: no port, and the data directory is this process's alone until it is closed. Rejects
   * with `not_opened` and one line for people where it cannot be. Log lines of severity error go to stderr.
   */
  static async open<M = Metadata>(options: OpenOptions<M>): Promise<VectorDB<M>> {
    const { errorsToStderr, openEngine } = await Effect.runPromise(embedded)
    return new VectorDB<M>(await Effect.runPromise(Effect.provide(openEngine(options), errorsToStderr)))
  }
}

/** Loaded when it is first wanted. */
const embedded = Effect.promise(() => import("./embedded/VectorDB.ts"))
