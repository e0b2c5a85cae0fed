/**
 * A process that appends to a partition in a directory and snapshots it now and then, and says on a line each what it was
 * told is in the log, until it is killed. Argument: the directory.
 */
import { writeSync } from "node:fs"
import { Effect } from "effect"
import * as FileObjectStore from "../../src/tiers/FileObjectStore.ts"
import { openOwner } from "./partitionOwner.ts"

const [directory = ""] = process.argv.slice(2)

const program = Effect.gen(function* () {
  const owner = yield* openOwner()
  for (let i = 0; ; i++) {
    const id = `${owner.log.epoch}.${i}`
    const seq = yield* owner.append(id)
    // Not through a stream, which would still hold it when the process is killed.
    writeSync(1, `${seq} ${id}\n`)
    if (i % 40 === 39) yield* owner.snapshot
  }
})

await Effect.runPromise(program.pipe(Effect.scoped, Effect.provide(FileObjectStore.layer({ directory }))))
