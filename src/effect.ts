/**
 * What a program on Effect imports: the client as effects and streams, on a service or with the engine in the program's own
 * process, on the Effect of the program. The engine is loaded when it is first opened.
 */
import { Effect, Layer, type Scope } from "effect"
import { type Metadata, type TypedClient, VectorClient, type VectorDBError } from "./client/index.ts"
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

/** Loaded when it is first wanted. */
const embedded = Effect.promise(() => import("./embedded/VectorDB.ts"))
