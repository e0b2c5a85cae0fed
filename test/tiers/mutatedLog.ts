/**
 * The partition's log with one of its safeguards taken out, to show that the simulation finds out: its source, changed in one
 * place, loaded as a module of its own.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { fileURLToPath, pathToFileURL } from "node:url"
import type * as PartitionLog from "../../src/tiers/PartitionLog.ts"

export interface Mutation {
  readonly name: string
  /** Text that is in the source once, and what is put there. */
  readonly from: string
  readonly to: string
}

const source = fileURLToPath(new URL("../../src/tiers/PartitionLog.ts", import.meta.url))

/** Loads the changed log, uses it, and removes it. */
export const withMutation = async <A>(
  { name, from, to }: Mutation,
  use: (open: typeof PartitionLog.open) => Promise<A>
): Promise<A> => {
  const text = readFileSync(source, "utf8")
  if (text.split(from).length !== 2) throw new Error(`${name}: the source does not hold this once:\n${from}`)
  // What it imports has to be the very modules that the test uses.
  const mutated = text.replace(from, () => to).replaceAll('from "./', `from "${dirname(source)}/`)
  const folder = mkdtempSync(join(tmpdir(), "ruvector-mutation-"))
  try {
    const file = join(folder, "PartitionLog.ts")
    writeFileSync(file, mutated)
    const module = (await import(/* @vite-ignore */ pathToFileURL(file).href)) as typeof PartitionLog
    return await use(module.open)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}
