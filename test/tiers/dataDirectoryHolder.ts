/**
 * A process that opens a data directory, says on one line how that went, and holds it until its standard input ends.
 * Arguments: the directory, and the moment to start at (milliseconds since 1970), so that several start together.
 */
import { Effect, Exit, Scope } from "effect"
import * as DataDirectory from "../../src/tiers/DataDirectory.ts"

const [directory = "", startAt = "0"] = process.argv.slice(2)

await new Promise((resolve) => setTimeout(resolve, Math.max(0, Number(startAt) - Date.now())))

const scope = Scope.makeUnsafe()
const exit = await Effect.runPromiseExit(DataDirectory.open({ path: directory }).pipe(Scope.provide(scope)))
if (Exit.isSuccess(exit)) {
  console.log(JSON.stringify({ outcome: "held" }))
  process.stdin.resume()
  await new Promise((resolve) => process.stdin.once("end", resolve))
  await Effect.runPromise(Scope.close(scope, Exit.void))
} else {
  const [reason] = exit.cause.reasons
  const error = reason?._tag === "Fail" ? reason.error : undefined
  console.log(JSON.stringify({ outcome: error?._tag ?? "defect", message: error?.message ?? String(exit.cause) }))
}
