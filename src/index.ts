/**
 * What a program imports: the client, and in a process of Node the engine too. That is loaded when it is first opened, so
 * that a client of a service waits for nothing that only the engine needs.
 */
import type { Metadata } from "./client/index.ts"
import * as Client from "./client/VectorDB.ts"
import type { OpenOptions } from "./embedded/VectorDB.ts"

export * from "./client/index.ts"
export { defaultSettings, Settings, type SettingValues } from "./config.ts"
export type { OpenOptions } from "./embedded/VectorDB.ts"

/** The client, on a service or, by `open`, with the engine in this process. */
export class VectorDB<M = Metadata> extends Client.VectorDB<M> {
  /**
   * Opens the engine in this process: no port, and the data directory is this process's alone until it is closed. Rejects
   * with one line for people where it cannot be opened. Log lines of severity error go to stderr.
   */
  static async open<M = Metadata>(options: OpenOptions<M>): Promise<VectorDB<M>> {
    const { openEngine } = await import("./embedded/VectorDB.ts")
    return new VectorDB<M>(await openEngine(options))
  }
}
