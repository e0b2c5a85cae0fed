import type { Metadata } from "../client/Engine.ts"
import type { StandardSchema } from "../client/StandardSchema.ts"
import type { SettingValues } from "../config.ts"

/** How the engine is opened in a program's own process. */
export interface OpenOptions<M = Metadata> {
  /** Data directory, made where it is missing, or `gs://bucket/prefix`; a server can open it afterwards, or has before. */
  readonly path: string
  /** Collection of calls that name none; `default` where left out. */
  readonly collection?: string
  /** For one call; 10,000 where left out. */
  readonly deadlineMillis?: number
  /** Checks metadata on its way in and out, and gives it its type. */
  readonly metadata?: StandardSchema<M>
  /** Settings of the engine, as of a server (`docs/operating.md`). */
  readonly settings?: Partial<SettingValues>
}
