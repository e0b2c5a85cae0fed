/**
 * What a program imports: the client, and in a process of Node the engine too. That is loaded when it is first opened, so
 * that a client of a service waits for nothing that only the engine needs.
 */
import { Effect, Layer, type Scope } from "effect"
import { type Metadata, type TypedClient, VectorClient, type VectorDBError } from "./client/index.ts"
import * as Client from "./client/VectorDB.ts"
import type { OpenOptions } from "./embedded/OpenOptions.ts"

export * from "./client/index.ts"
export { defaultSettings, type SettingName, Settings, type SettingValues } from "./config.ts"
export type { OpenOptions } from "./embedded/OpenOptions.ts"

/**
 * The engine in this process, for programs on Effect: `VectorClient` without a service. It is ended with the layer, after
 * what it holds is safe.
 *
 *     Effect.provide(program, layerEmbedded({ path: "data" }))
 */
export const layerEmbedded = (options: Omit<OpenOptions, "metadata">): Layer.Layer<VectorClient, VectorDBError> =>
  Layer.effect(VectorClient, makeEmbedded(options))

/** The same in a scope, for a service of a program's own, with metadata of its own type. */
export const makeEmbedded = <M = Metadata>(
  options: OpenOptions<M>
): Effect.Effect<TypedClient<M>, VectorDBError, Scope.Scope> =>
  Effect.flatMap(embedded, ({ makeEmbeddedClient }) => makeEmbeddedClient(options))

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
