import { spawn } from "node:child_process"
import { once } from "node:events"
import { fileURLToPath } from "node:url"
import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import * as FileObjectStore from "../../src/tiers/FileObjectStore.ts"
import { seededRandom } from "./FaultyObjectStore.ts"
import { tempFolder } from "./objectStoreSuite.ts"
import { openOwner } from "./partitionOwner.ts"

const writer = fileURLToPath(new URL("partitionLogWriter.ts", import.meta.url))

/** Lets a writer run for some time after its first acknowledgement, kills it, and returns what it had been told. */
const lifeOf = async (directory: string, millis: number): Promise<ReadonlyArray<readonly [number, string]>> => {
  const child = spawn(process.execPath, [writer, directory], { stdio: ["ignore", "pipe", "inherit"] })
  let text = ""
  child.stdout.setEncoding("utf8")
  child.stdout.on("data", (chunk: string) => {
    text += chunk
  })
  const ended = once(child, "close")
  await Promise.race([once(child.stdout, "data"), ended])
  await new Promise((resolve) => setTimeout(resolve, millis))
  child.kill("SIGKILL")
  await ended
  return text
    .split("\n")
    .slice(0, -1)
    .map((line) => line.split(" "))
    .map(([seq, id]) => [Number(seq), id ?? ""])
}

describe("partition log in a directory", () => {
  it.live(
    "has everything that was acknowledged, after each of several kill -9",
    () =>
      Effect.gen(function* () {
        const directory = yield* tempFolder
        const random = seededRandom(11)
        const acknowledged = new Map<number, string>()
        for (let round = 0; round < 6; round++) {
          const told = yield* Effect.promise(() => lifeOf(directory, random() * 400))
          for (const [seq, id] of told) acknowledged.set(seq, id)
          const found = yield* openOwner().pipe(
            Effect.map((owner) => {
              assert.deepStrictEqual([owner.log.cut, owner.log.snapshotsRefused], [0, 0])
              return new Map(owner.applied())
            }),
            Effect.scoped,
            Effect.provide(FileObjectStore.layer({ directory }))
          )
          for (const [seq, id] of acknowledged) assert.strictEqual(found.get(seq), id)
          // At most the one append that was under way at each kill is there beside them.
          assert.isAtMost(found.size, acknowledged.size + round + 1)
        }
        assert.isAbove(acknowledged.size, 50)
      }),
    60_000
  )
})
